"""Three client generators read our document; each client imports, has all operations, and reads what we write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama_stack.apis import DRAFT_APIS, Shape, operations
from llama_stack.apis.common import Dialog, Message, StopReason, ToolCall, ToolDefinition
from llama_stack.apis.inference import ChatCompletionRequest, ChatCompletionResponse
from llama_stack.server.openapi import draft_document

TOOLS = Path(sys.executable).parent
QUICK_JAVA = "-XX:TieredStopAtLevel=1"

REQUEST = ChatCompletionRequest(
    model="llama3_8b_chat",
    dialog=Dialog(message=Message.user("What is 2 + 2?"), message_history=[Message.system("Be brief.")]),
    available_tools=[ToolDefinition(tool_name="math", parameters={"expression": {"type": "string"}})],
)
REPLY = ChatCompletionResponse(
    content="", tool_calls=[ToolCall(tool_name="math", arguments={"expression": "2 + 2", "steps": None, "n": [1, 2.5]})]
)
PLAIN_REPLY = ChatCompletionResponse(content="4", tool_calls=[], stop_reason=StopReason.FINISHED_OK)


def operations_of(document: dict[str, dict[str, dict[str, object]]]) -> set[str]:
    return {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(draft_document()))
    (folder / "request.json").write_text(REQUEST.model_dump_json(exclude_none=True))
    (folder / "reply.json").write_text(REPLY.model_dump_json(exclude_none=True))
    (folder / "plain_reply.json").write_text(PLAIN_REPLY.model_dump_json(exclude_none=True))
    return folder


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in the folder and return what it prints; a non-zero exit fails the test with all it said."""
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}", "JAVA_OPTS": QUICK_JAVA}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command[0]} exited {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def python(folder: Path, code: str) -> str:
    return run(
        folder, sys.executable, "-c", "import json, pathlib\nread = lambda n: pathlib.Path(n).read_text()\n" + code
    )


def test_datamodel_code_generator_makes_models_that_read_ours(folder: Path) -> None:
    """The Python world's usual way to types: every component becomes a class, and carries our values unchanged."""
    options = (
        "--input-file-type",
        "openapi",
        "--output-model-type",
        "pydantic_v2.BaseModel",
        "--formatters",
        "builtin",
    )
    run(folder, TOOLS / "datamodel-codegen", "--input", "openapi.json", "--output", "models.py", *options)
    printed = python(
        folder,
        "import models\n"
        "request = models.ChatCompletionRequest.model_validate_json(read('request.json'))\n"
        "assert json.loads(request.model_dump_json(exclude_none=True)) == json.loads(read('request.json'))\n"
        "models.ChatCompletionResponse.model_validate_json(read('reply.json'))\n"
        "print(' '.join(dir(models)))\n",
    )
    assert set(draft_document()["components"]["schemas"]) <= set(printed.split())


def test_openapi_python_client_makes_all_operations(folder: Path) -> None:
    """On the draft's own file this generator drops half of the operations; on ours, none.

    It warns of the replies that are lines, which it cannot read, and of nothing else.
    """
    (folder / "config.yaml").write_text("post_hooks: []\n")
    options = ("--path", "openapi.json", "--output-path", "typed_client", "--meta", "none", "--config", "config.yaml")
    said = run(folder, TOOLS / "openapi-python-client", "generate", *options)
    lists = [operation for api in DRAFT_APIS for operation in operations(api) if operation.shape is Shape.LINES]
    drafts = {operation.key for operation in lists if not operation.is_extension}
    assert set(re.findall(r"WARNING parsing (\w+ \S+) within", said)) == drafts
    assert said.count("Unsupported content_type application/jsonl") == said.count("WARNING") == len(drafts)
    printed = python(
        folder,
        "import importlib, pkgutil, typed_client\n"
        "for m in pkgutil.walk_packages(typed_client.__path__, 'typed_client.'):\n"
        "    importlib.import_module(m.name)\n"
        "from typed_client.models import ChatCompletionRequest, NormalChatCompletionResponse\n"
        "request = json.loads(read('request.json'))\n"
        "assert ChatCompletionRequest.from_dict(request).to_dict() == request\n"
        "NormalChatCompletionResponse.from_dict(json.loads(read('reply.json')))\n"
        "from typed_client.api.inference import post_inference_batch_chat_completion as batch\n"
        "from typed_client.models import BatchChatCompletionRequest\n"
        "request['batch_dialogs'] = [request.pop('dialog')]\n"
        "del request['stream']\n"
        "sent = batch._get_kwargs(body=BatchChatCompletionRequest.from_dict(request))\n"
        "assert (sent['method'], sent['url'], sent['json']) == "
        "('post', '/inference/batch_chat_completion', request)\n",
    )
    assert printed == ""
    found = set()
    for module in (folder / "typed_client" / "api").glob("*/*.py"):
        text = module.read_text()
        method, url = re.search(r'"method": "(\w+)"', text), re.search(r'"url": "([^"]+)"', text)
        if method and url:
            found.add(f"{method[1].upper()} {url[1]}")
    assert found == operations_of(draft_document())


def test_openapi_generator_makes_all_operations(folder: Path) -> None:
    """The generator for fifty languages.

    Its Python clients cannot read a string inside a JSON object, the draft's own file or ours (docs/openapi.md), so the
    reply here has no arguments.
    """
    run(folder, TOOLS / "openapi-generator-cli", "generate", "-i", "openapi.json", "-g", "python", "-o", "java_client")
    python(
        folder / "java_client",
        "import openapi_client, openapi_client.api\n"
        "from openapi_client.models.chat_completion_request import ChatCompletionRequest\n"
        "from openapi_client.models.chat_completion_response import ChatCompletionResponse\n"
        "request = read('../request.json')\n"
        "assert ChatCompletionRequest.from_json(request).to_dict() == json.loads(request)\n"
        "reply = ChatCompletionResponse.from_json(read('../plain_reply.json'))\n"
        "assert reply.content.actual_instance == '4'\n",
    )
    text = "".join(
        module.read_text() for module in (folder / "java_client" / "openapi_client" / "api").glob("*_api.py")
    )
    found = set(re.findall(r"method='(\w+)',\s+resource_path='([^']+)'", text))
    assert {f"{method} {path}" for method, path in found} == operations_of(draft_document())
