"""A model of ours as lm-evaluation-harness sees one; imported only where that is installed.

Choices of one question share its text, which is read once; the choices of several questions are
read together.  Answers are written several at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cvxq.errors import ArgumentError
from cvxq.generate import Generation
from cvxq.lean.decoder import Batch, BatchingDecoder
from cvxq.model import Model
from cvxq.progress import Progress
from cvxq.sample import SamplingSettings
from cvxq.scoring import Ending, Score, in_order, score, score_together
from cvxq.together import Order, generate_together

_LONGEST = 2048  # tokens of a window, where the model states no context
_ANSWER_TOKENS = 256  # of an answer, where a task does not say
_TOGETHER = 16  # answers that are written beside each other, or endings that are read
_TOKENS_TOGETHER = 16384  # of texts beside each other, of which keys and values are held

Scored = tuple[float, bool]  # log-likelihood in nats, and whether each token was the likeliest
Request = tuple[Any, list[int], list[int]]  # the texts, and tokens: given, and to be scored


class HarnessModel(TemplateLM):
    """A loaded model, packed weights and all."""

    def __init__(self, model: Model, progress: Progress | None = None) -> None:
        """Let `progress` hear of requests that are done."""
        super().__init__()
        self.model = model
        self.max_length = model.context_length or _LONGEST
        self._session = model.session()
        start = model.tokenizer.bos_token_id
        self._start = "" if start is None else model.tokenizer.decode([start])
        self._progress = progress or (lambda stage, done, total: None)

    @property
    def eot_token_id(self) -> int:
        """The token between texts."""
        end = self.model.tokenizer.eos_token_id
        return min(self.model.end_ids) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing else stands before."""
        start = self.model.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text, as the tokenizer does by default if not told otherwise.

        A text that begins with the token that begins texts gets no second one.
        """
        if add_special_tokens is None and self._start and string.startswith(self._start):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.model.tokenizer(string, verbose=False, **chosen)["input_ids"]
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[Scored]:
        endings = [self._ending(given, scored) for _, given, scored in requests]
        found: list[Scored] = [(0.0, True)] * len(endings)
        for done, (index, value) in enumerate(self._scores(endings)):
            found[index] = value.value, value.is_likeliest
            self._progress("score", done + 1, len(endings))
        return found

    def _ending(self, given: list[int], scored: list[int]) -> Ending:
        """What is to be scored, and of what comes before as much as fits."""
        room = self.max_length - len(scored) + 1  # the last token is not read
        if room < 1:
            raise ArgumentError(
                f"{len(scored)} tokens are to be scored, allowed {self.max_length}, the context"
            )
        return Ending(tuple(given[-room:]), tuple(scored))

    def _scores(self, endings: Sequence[Ending]) -> Iterator[tuple[int, Score]]:
        """Yield the scores with their numbers, several at a time where the decoder can."""
        longest = max((ending.length for ending in endings), default=1)
        batch = self._batch(max(1, min(_TOGETHER, _TOKENS_TOGETHER // longest)), longest)
        if batch is not None:
            yield from score_together(batch, endings)
            return
        for index in in_order(endings):
            given, scored = endings[index].tokens
            logits = self._session.resume(given)[None]
            if len(scored) > 1:
                logits = np.concatenate([logits, self._session.feed_each(scored[:-1])])
            yield index, score(logits, scored)

    def _batch(self, texts: int, tokens: int) -> Batch | None:
        """Texts of so many tokens to read together, where the model's decoder can."""
        decoder = self.model.decoder
        return decoder.batch(texts, tokens) if isinstance(decoder, BatchingDecoder) else None

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each whole text, window by window."""
        windows: list[Request] = []
        ends = [0]
        for request in requests:
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                self.prefix_token_id,
                self.max_length - 1,
                1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        scored = self._loglikelihood_tokens(windows)
        return [sum(value for value, _ in scored[a:b]) for a, b in pairwise(ends)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each request, until one of its stop texts."""
        orders = [self._order(*request.args) for request in requests]
        answers = [""] * len(orders)
        for done, (index, found) in enumerate(self._answers(orders)):
            answers[index] = found.text
            self._progress("generate", done + 1, len(orders))
        return answers

    def _answers(self, orders: Sequence[Order]) -> Iterator[tuple[int, Generation]]:
        """Yield the answers with their numbers, several at a time where the decoder can."""
        most = max((_tokens(order) for order in orders), default=1)
        batch = self._batch(_TOGETHER, min(most, self.max_length))
        if batch is not None:
            yield from generate_together(batch, self.model.tokenizer, orders)
            return
        for index, order in enumerate(orders):
            ids, settings = order.prompt_ids, order.settings
            yield index, self.model.generate(ids, settings, session=self._session)

    def _order(self, prompt: str, options: dict[str, Any]) -> Order:
        until = options.get("until") or []
        most = int(options.get("max_gen_toks", options.get("max_tokens", _ANSWER_TOKENS)))
        settings = SamplingSettings(
            temperature=float(options.get("temperature", 0)) if options.get("do_sample") else 0,
            top_p=float(options.get("top_p") or 1),
            max_tokens=most,
            stop=(until,) if isinstance(until, str) else tuple(until),
        )
        ids = self.model.encode(prompt)[-max(1, self.max_length - most) :]
        return Order(ids, settings, self.model.text_end_ids(ids))


def _tokens(order: Order) -> int:
    """Tokens of the prompt and the longest answer."""
    return len(order.prompt_ids) + (order.settings.max_tokens or 0)


def evaluate(
    model: HarnessModel, tasks: Sequence[Any], limit: int | None, shots: int | None
) -> dict[str, Any]:
    """Return what the harness finds on tasks, by their names or configurations.

    limit: documents of each; shots: solved examples before each, the task's own if None.
    Raises ArgumentError for a task that the harness cannot make.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    # The harness reads the configurations of all its tasks, over ten thousand, to find one by name.
    named = any(isinstance(task, str) for task in tasks)
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=shots,
            log_samples=True,
            task_manager=TaskManager(include_defaults=named),
        )
    except (KeyError, ValueError, OSError) as error:
        raise ArgumentError(f"lm-evaluation-harness: {error}") from error
    assert results is not None  # of the first process, which this is
    return dict(results)
