# mypy: disable-error-code="import-not-found, import-untyped"
"""Stock Python clients against a running server; runs in an environment that holds the clients.

    python tests/clients/python_clients.py ADDRESS MODEL_DIRECTORY

Prints a line for each client: its version and what was compared. Exits with 1 where one failed.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import tempfile
import traceback
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "moe-8x32"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
DOCUMENTED = re.compile(r"^```(\w+) client\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEFAULT = "http://127.0.0.1:8000"
"""The address in the document."""
PROMPT = "The history of the town"


def documented_clients(address: str) -> list[tuple[str, str]]:
    """Language and text of every block of the document that speaks to the server at `address`."""
    blocks = DOCUMENTED.findall(DOCUMENT.read_text(encoding="utf-8"))
    return [(language, text.replace(DEFAULT, address)) for language, text in blocks]


class Reference:
    """The stock model's own answers, by transformers."""

    def __init__(self, directory: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.directory = directory
        self._torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def greedy(self, text: str, count: int) -> str:
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        out = self._model.generate(ids, max_new_tokens=count, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    def loglikelihood(self, context: str, continuation: str) -> float:
        whole = self.tokenizer(context + continuation, return_tensors="pt").input_ids
        start = len(self.tokenizer(context).input_ids)
        with self._torch.no_grad():
            logprobs = self._model(whole).logits[0].float().log_softmax(-1)
        return sum(float(logprobs[i - 1, whole[0, i]]) for i in range(start, whole.shape[1]))


def check_openai(address: str, reference: Reference) -> str:
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve(MODEL).id == MODEL
    expected = reference.greedy(PROMPT, 12)
    options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    assert client.completions.create(**options).choices[0].text == expected
    streamed = client.completions.create(**options, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == expected
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, n=2)
    assert len(chat.choices) == 2
    pieces = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0, stream=True
    )
    whole = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=8, temperature=0
    )
    said = "".join(event.choices[0].delta.content or "" for event in pieces)
    assert said == whole.choices[0].message.content
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    shaped = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )  # fmt: skip
    assert json.loads(shaped.choices[0].message.content or "")["colour"] in ("red", "green")
    code = ""
    try:
        client.completions.create(model="none", prompt="a")
    except openai.NotFoundError as error:
        code = error.code or ""
    assert code == "model_not_found"
    return "models, completions, chat, streams, n, json_schema, errors"


def check_langchain(address: str, reference: Reference) -> str:
    from langchain_openai import ChatOpenAI, OpenAI

    where: dict[str, Any] = {"base_url": f"{address}/v1", "api_key": "none", "model": MODEL}
    llm = OpenAI(**where, temperature=0, max_tokens=12)
    assert llm.invoke(PROMPT) == reference.greedy(PROMPT, 12)
    assert "".join(llm.stream(PROMPT)) == reference.greedy(PROMPT, 12)
    assert len(llm.batch([PROMPT, "A"])) == 2
    chat = ChatOpenAI(**where, temperature=0, max_tokens=12)
    said = chat.invoke([("system", "Be short."), ("human", "Hello")])
    assert said.content and said.usage_metadata
    assert "".join(str(piece.content) for piece in chat.stream("Hello"))
    logged = ChatOpenAI(**where, temperature=0, max_tokens=4, logprobs=True).invoke("Hello")
    assert len(logged.response_metadata["logprobs"]["content"]) == 4
    return "OpenAI and ChatOpenAI: invoke, stream, batch, logprobs"


def check_litellm(address: str, reference: Reference) -> str:
    import litellm

    where: dict[str, Any] = {"api_base": f"{address}/v1", "api_key": "none"}
    said = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        **where,
    )
    assert said.choices[0].text == reference.greedy(PROMPT, 12)
    messages = [{"role": "user", "content": "Hello"}]
    chat = litellm.completion(model=f"openai/{MODEL}", messages=messages, max_tokens=8, **where)
    assert chat.usage.completion_tokens
    pieces = litellm.completion(
        model=f"openai/{MODEL}", messages=messages, max_tokens=8, stream=True, **where
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)
    hosted = litellm.completion(
        model=f"hosted_vllm/{MODEL}", messages=messages, max_tokens=8, top_k=5, min_p=0.01, **where
    )
    assert hosted.choices[0].message.content
    return "text_completion, completion, stream, as hosted_vllm"


def check_lm_eval(address: str, reference: Reference) -> str:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model=MODEL, tokenizer_backend="huggingface",
        tokenizer=reference.directory, max_length=512, num_concurrent=4, batch_size=1,
    )  # fmt: skip
    pairs = [(PROMPT, " was"), (PROMPT, " of the river"), ("It is", " a")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for (context, continuation), (found, _) in zip(pairs, model.loglikelihood(asked), strict=True):
        expected = reference.loglikelihood(context, continuation)
        assert math.isclose(found, expected, abs_tol=1e-3), (found, expected)
    rolling = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (PROMPT,), 0)])
    assert rolling[0] < 0
    until = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0}
    (said,) = model.generate_until([Instance("generate_until", {}, (PROMPT, until), 0)])
    assert said == reference.greedy(PROMPT, 12).split("\n\n")[0]
    chat = LocalChatCompletion(
        base_url=f"{address}/v1/chat/completions", model=MODEL, tokenizer_backend=None
    )
    messages = chat.apply_chat_template([{"role": "user", "content": "Hello"}])
    (talk,) = chat.generate_until([Instance("generate_until", {}, (messages, until), 0)])
    assert isinstance(talk, str)
    return "loglikelihood (against transformers), rolling, generate_until, chat"


def check_guidellm(address: str, reference: Reference) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        for kind in ("/v1/completions", "/v1/chat/completions"):
            done = subprocess.run(
                [
                    str(Path(sys.executable).with_name("guidellm")), "run",
                    "--backend", f"kind=openai_http,target={address},model={MODEL},"
                    f"request_format={kind}",
                    "--profile", "kind=concurrent,streams=3",
                    "--constraint", "kind=max_requests,count=8",
                    "--tokenizer", f"kind=huggingface_auto,model={reference.directory}",
                    "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=12",
                    "--output", f"kind=json,path={out}", "--disable-console",
                ],
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-1500:] + done.stdout[-500:]
            report = json.loads(out.read_text())
            totals = report["benchmarks"][0]["metrics"]["request_totals"]
            assert totals["successful"] == 8 and not totals["errored"], totals
    return "run on completions and chat, 8 requests each"


def check_vllm_bench(address: str, reference: Reference) -> str:
    """The payloads of `vllm bench serve`, as its backends openai and openai-chat send them."""
    completion = {
        "model": MODEL, "prompt": PROMPT, "temperature": 0.0, "repetition_penalty": 1.0,
        "max_tokens": 12, "logprobs": None, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    events = _events(f"{address}/v1/completions", completion)
    assert events[-1]["usage"]["completion_tokens"] == 12
    chat = {
        "model": MODEL, "max_completion_tokens": 12, "stream": True, "temperature": 0.0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "ignore_eos": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    events = _events(f"{address}/v1/chat/completions", chat)
    assert events[-1]["usage"]["completion_tokens"] == 12
    return "payloads of the backends openai and openai-chat"


def _events(url: str, payload: dict[str, Any]) -> list[Any]:
    asked = urllib.request.Request(
        url, json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        lines = [line.decode().strip() for line in answer]
    said = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert said[-1] == "[DONE]"
    return [json.loads(line) for line in said[:-1]]


def check_documents(address: str, reference: Reference) -> str:
    for language, text in documented_clients(address):
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euc", text]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return "every client of docs/serving.md as it stands"


CHECKS: dict[str, tuple[str, Callable[[str, Reference], str]]] = {
    "openai": ("openai", check_openai),
    "LangChain": ("langchain-openai", check_langchain),
    "litellm": ("litellm", check_litellm),
    "lm-evaluation-harness": ("lm_eval", check_lm_eval),
    "guidellm": ("guidellm", check_guidellm),
    "vllm bench serve": ("", check_vllm_bench),
    "documents": ("", check_documents),
}


def main(address: str, directory: str) -> int:
    reference, failed = Reference(directory), 0
    for name, (package, check) in CHECKS.items():
        number = version(package) if package else "(payloads)"
        try:
            print(f"{name} {number}: {check(address, reference)}", flush=True)
        except Exception:
            failed += 1
            print(f"{name} {number}: FAILED\n{traceback.format_exc()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    asyncio.set_event_loop(asyncio.new_event_loop())
    sys.exit(main(*sys.argv[1:3]))
