"""The settings of `python -m runtime.server`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.serving.chat import read_template
from runtime.serving.model_settings import ModelSettings

FORMATS = ("hermes", "mistral", "llama", "harmony")
"""Formats of calls of tools."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine reaches."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ModelSettings):
    """Serve a model over HTTP as OpenAI's API does. Ctrl-C stops it cleanly."""

    name: str | None = None
    """What clients call the model; by default the last part of `model`."""
    host: str = "127.0.0.1"
    """Address to listen at. The default can be reached from this machine only."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    page: bool | None = None
    """Whether to show a page at `/`: a chat, and the experts at work. By default where this machine
    alone reaches the server.
    """
    token_file: Path | None = None
    """File with the bearer token that clients must send."""
    max_body: int = 1 << 20
    """Bytes of a request at the most."""
    body_timeout: float = 30.0
    """Seconds that the body of a request may take to arrive."""
    max_queue: int = 256
    """Choices in flight or waiting at the most; further requests are turned away (429)."""
    max_choices: int = 128
    """Choices of one request at the most: its prompts times `n`."""
    max_priority: int = 0
    """Highest priority that a client may ask for; everyone may ask for less."""
    chat_template: str | None = None
    """Chat template in place of the model's own: a file, or the template itself."""
    tool_format: str | None = None
    """How the model writes calls of tools: hermes, mistral, llama or harmony; by default what the
    chat template tells.
    """
    grace: int = 30
    """Seconds that running requests may take after the server was told to stop."""

    replicas: int = 0
    """Replicas of the server, each with the model, behind Ray Serve: on the cluster that
    RAY_ADDRESS names, else on this machine. 0 serves in this process. Needs the extra `ray`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replicas < 0:
            raise ValueError(f"replicas={self.replicas} is negative")
        if self.replicas and self.record:
            raise ValueError("record: several replicas cannot write one recording; serve without")
        if self.replicas and self.page:
            raise ValueError("page: it shows one process, not replicas; serve without either")
        if self.replicas and not self.port:
            raise ValueError("port=0: Ray Serve takes no free port by itself, so name one")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} is not in 0 to 65535")
        for name in ("max_body", "max_queue", "max_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if not self.body_timeout > 0:
            raise ValueError(f"body_timeout={self.body_timeout} is not above 0")
        if self.grace < 0:
            raise ValueError(f"grace={self.grace} is negative")
        if self.tool_format not in (None, *FORMATS):
            raise ValueError(f"tool_format={self.tool_format!r} is not one of {', '.join(FORMATS)}")

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches the server."""
        return self.host in LOOPBACK

    @property
    def has_page(self) -> bool:
        return self.is_local and not self.replicas if self.page is None else self.page

    @property
    def model_name(self) -> str:
        return self.name or Path(self.model).name

    def read_template(self) -> str | None:
        """The chat template, if one is given. Raises ValueError for a file that is missing."""
        return None if self.chat_template is None else read_template(self.chat_template)

    def read_token(self) -> str | None:
        """The bearer token, if one is asked for. Raises ValueError for an empty file."""
        if self.token_file is None:
            return None
        token = self.token_file.read_text().strip()
        if not token:
            raise ValueError(f"the token file {self.token_file} is empty")
        return token
