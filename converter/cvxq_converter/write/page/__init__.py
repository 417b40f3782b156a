"""The report of a conversion as one HTML page that needs nothing else: no network, no script."""

from cvxq_converter.write.page.folder import write_report

__all__ = ["write_report"]
