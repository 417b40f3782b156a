"""What may stand in a request.

Everything OpenAI's API knows and this server honours, the further settings that local servers have
in common (top_k, min_p, repetition_penalty, chat_template_kwargs), and what has no bearing on one
machine and is ignored.  Anything else is refused, since an answer that ignores it would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cvxq.sample import SamplingSettings

MOST_CHOICES = 32  # of a request
MOST_TOP_LOGPROBS = 20
_COMPLETION_TOKENS = 16  # the default of OpenAI's completions


class Schema(BaseModel):
    """An object of a request: null is as good as absent."""

    model_config = ConfigDict(extra="forbid", defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class Lenient(Schema):
    """An object whose further fields do not matter."""

    model_config = ConfigDict(extra="allow")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(Schema):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False  # ignored


class Request(Schema):
    """What requests for a text have in common."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = 1.0
    seed: int | None = None
    stream: bool = False

    # Of no bearing here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prediction: Any = None

    def sampling(self, choice: int, max_tokens: int | None, **more: Any) -> SamplingSettings:
        """Return the settings of one choice; each draws by a seed of its own."""
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),  # −1 means all to other servers
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            max_tokens=max_tokens,
            **more,
        )


class TextRequest(Request):
    """What chat and plain completions have in common."""

    stop: Annotated[list[str], BeforeValidator(_as_list)] = Field([], max_length=64)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    def sampling(self, choice: int, max_tokens: int | None, **more: Any) -> SamplingSettings:
        """Return the settings of one choice, see `Request.sampling`; more: further stop strings."""
        stop = (*self.stop, *more.pop("stop", ()))
        bias = tuple(self.logit_bias.items())
        return super().sampling(choice, max_tokens, stop=stop, logit_bias=bias, **more)


class CompletionRequest(TextRequest):
    """POST /v1/completions."""

    prompt: str | Annotated[list[int] | list[str] | list[list[int]], Field(min_length=1)]
    max_tokens: int = Field(_COMPLETION_TOKENS, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool = False
    best_of: int | None = None
    suffix: str = ""

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The texts to continue, each as it is or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [token for token in self.prompt if isinstance(token, int)]
        return [tokens] if tokens else [p for p in self.prompt if not isinstance(p, int)]

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not supported; leave it out")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of other than n is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which only makes sense with echo; give 1 or more")
        return self


class Part(Lenient):
    """A part of a message's content; only texts are understood."""

    type: str
    text: str = ""
    refusal: str = ""

    @model_validator(mode="after")
    def _check(self) -> Part:
        if self.type not in ("text", "input_text", "output_text", "refusal"):
            raise ValueError(f"content of type {self.type!r} is not supported; only text is")
        return self


class Called(Schema):
    """The function of a tool call, its arguments as JSON."""

    name: str
    arguments: str = "{}"


class CallMade(Lenient):
    """A tool call that an earlier answer made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Called


class Message(Lenient):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)] = []
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallMade] = []
    tool_call_id: str | None = None

    @classmethod
    def of(cls, role: Literal["system", "user"], text: str) -> Message:
        """Return the turn of `role` that says `text`."""
        return cls(role=role, content=[Part(type="text", text=text)])

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text or part.refusal for part in self.content)


class Function(Lenient):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[\w.\-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool = False


class Tool(Schema):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    """The name of a function."""

    name: str


class ToolChoice(Schema):
    """The one tool to use."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Schema):
    """The JSON that an answer has to be."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool = True


class ResponseFormat(Schema):
    """What kind of text an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, None for any text."""
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema else {"type": "object"}


class ChatRequest(TextRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat = Field(default_factory=lambda: ResponseFormat(type="text"))
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    modalities: list[Literal["text"]] = ["text"]


class TextFormat(Schema):
    """The format of a response's text, as /v1/responses writes it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool = True

    def told(self) -> dict[str, Any]:
        """As a response repeats it: what belongs to a schema only where there is one."""
        kept = None if self.type == "json_schema" else {"type"}
        return self.model_dump(by_alias=True, include=kept)


class TextOptions(Schema):
    """The text of a response."""

    format: TextFormat = Field(
        default_factory=lambda: TextFormat(type="text", schema={"type": "object"})
    )


class Reasoning(Schema):
    """How much a model thinks."""

    effort: str | None = None
    summary: Any = None  # ignored: what a model thinks is sent whole


class ResponsesRequest(Request):
    """POST /v1/responses, for text."""

    input: str | list[Message]
    instructions: str = ""
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    include: Any = None  # ignored: there is nothing further to include
    stream_options: Any = None  # ignored: usage is always sent
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Any = None
    parallel_tool_calls: Any = None


class TokenizeRequest(Schema):
    """POST /tokenize: the tokens of a text or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = []
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Schema):
    """POST /detokenize: the text of tokens."""

    model: str | None = None
    tokens: list[int]
