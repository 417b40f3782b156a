"""vLLM's plugin: it serves a `.cvxq` file, or what `cvxq export` wrote, its matrices packed.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its
processes.  Nothing of cvxq depends on vLLM, and only what `register` calls imports it.
"""

from __future__ import annotations


def register() -> None:
    """Teach this process's vLLM the quantization method `cvxq` and files of that suffix.

    May be called again, to no effect.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from cvxq.export import METHOD
    from cvxq.integrations.vllm import engine_arguments
    from cvxq.integrations.vllm.config import CvxqConfig, pack_every_embedding

    register_quantization_config(METHOD)(CvxqConfig)
    pack_every_embedding()
    engine_arguments.accept_files()
