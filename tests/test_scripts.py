"""The scripts: how they are spliced, that headers, Lua and Python agree, and that both managers are the same."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import presence
import presence.sync
from presence import operations, replies, scripts
from presence.exchanges import clean_up
from presence.operations import CLEANUP_BATCH_SIZE, RETENTION_MS, Operation, Operations
from presence.scripts import Script, ScriptError, splice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

LUA = Path(str(scripts.lua_folder()))
SCRIPTS: dict[str, Script] = {value.name: value for value in vars(operations).values() if isinstance(value, Script)}
INCLUDES = sorted(file.stem for file in (LUA / "include").iterdir())

every_script = pytest.mark.parametrize("name", SCRIPTS)


class TestIncludes:
    """A script is its file with every include spliced in once, where it is first asked for."""

    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[[str, str], None]:
        (tmp_path / "include").mkdir()

        def write(name: str, text: str) -> None:
            (tmp_path / f"{name}.lua").write_text(text, encoding="utf-8")

        return write

    def test_an_include_is_spliced_in_where_it_is_asked_for(
        self, tmp_path: Path, write: Callable[[str, str], None]
    ) -> None:
        write("main", "#!lua\n-- @include step\nreturn step()\n")
        write("include/step", "local function step()\n  return 'ö'\nend\n")
        assert splice(tmp_path, "main") == "#!lua\nlocal function step()\n  return 'ö'\nend\nreturn step()\n"

    def test_an_include_may_include_another(self, tmp_path: Path, write: Callable[[str, str], None]) -> None:
        write("main", "-- @include outer\nmain\n")
        write("include/outer", "-- @include inner\nouter\n")
        write("include/inner", "inner\n")
        assert splice(tmp_path, "main") == "inner\nouter\nmain\n"

    def test_an_include_used_twice_is_spliced_in_once(self, tmp_path: Path, write: Callable[[str, str], None]) -> None:
        write("main", "-- @include left\n-- @include right\n-- @include shared\nmain\n")
        write("include/left", "-- @include shared\nleft\n")
        write("include/right", "-- @include shared\nright\n")
        write("include/shared", "shared\n")
        assert splice(tmp_path, "main") == "shared\nleft\nright\nmain\n"

    def test_only_a_whole_line_is_an_include(self, tmp_path: Path, write: Callable[[str, str], None]) -> None:
        text = "return 1 -- @include step\n-- @include step, please\n-- @include ../step\n"
        write("main", text)
        assert splice(tmp_path, "main") == text

    def test_an_indented_include_is_there_for_its_block_only(
        self, tmp_path: Path, write: Callable[[str, str], None]
    ) -> None:
        block = "if {} then\n  -- @include step\n  -- @include other\n\n  step()\nend\n"
        write("main", block.format("a") + block.format("b"))
        write("include/step", "local function step()\n  return 1\nend\n")
        write("include/other", "-- @include step\nother\n")
        spliced = "if {} then\n  local function step()\n    return 1\n  end\n  other\n\n  step()\nend\n"
        assert splice(tmp_path, "main") == spliced.format("a") + spliced.format("b")

    def test_what_a_script_includes_is_there_in_its_blocks(
        self, tmp_path: Path, write: Callable[[str, str], None]
    ) -> None:
        write("main", "-- @include step\nif a then\n  -- @include step\n  step()\nend\n")
        write("include/step", "step\n")
        assert splice(tmp_path, "main") == "step\nif a then\n  step()\nend\n"

    def test_a_missing_script_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ScriptError, match=r"there is no main\.lua"):
            splice(tmp_path, "main")

    def test_a_missing_include_is_named_with_the_chain_that_leads_to_it(
        self, tmp_path: Path, write: Callable[[str, str], None]
    ) -> None:
        write("main", "-- @include outer\n")
        write("include/outer", "-- @include missing\n")
        with pytest.raises(ScriptError, match=r"no missing\.lua, included through main -> outer -> missing"):
            splice(tmp_path, "main")

    def test_a_script_is_no_include(self, tmp_path: Path, write: Callable[[str, str], None]) -> None:
        write("main", "-- @include other\n")
        write("other", "return 1\n")
        with pytest.raises(ScriptError, match="main -> other"):
            splice(tmp_path, "main")

    @pytest.mark.parametrize(
        ("files", "chain"),
        [
            ({"main": "outer", "include/outer": "inner", "include/inner": "outer"}, "main -> outer -> inner -> outer"),
            ({"main": "itself", "include/itself": "itself"}, "main -> itself -> itself"),
            ({"main": "outer", "include/outer": "main"}, "main -> outer -> main"),
        ],
    )
    def test_a_cycle_is_named(
        self, tmp_path: Path, write: Callable[[str, str], None], files: dict[str, str], chain: str
    ) -> None:
        for name, include in files.items():
            write(name, f"-- @include {include}\n")
        with pytest.raises(ScriptError, match=f"leads back to itself: {chain}$"):
            splice(tmp_path, "main")

    def test_an_installation_without_the_lua_files_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
        monkeypatch.setattr(scripts, "__file__", str(tmp_path / "presence" / "scripts.py"))
        with pytest.raises(ScriptError, match="install the package again"):
            scripts.lua_folder()

        (tmp_path / "lua").mkdir()
        assert scripts.lua_folder() == tmp_path / "lua"


class Header:
    """The comment at a script's head, and the block that binds the slots which it names."""

    def __init__(self, name: str) -> None:
        text = (LUA / f"{name}.lua").read_text(encoding="utf-8")
        match = re.fullmatch(
            r"#!lua(?: flags=(?P<flags>[a-z,-]+))?\n--\[\[\n(?P<header>.*?)\n\]\]\n(?P<body>.*)", text, re.DOTALL
        )
        assert match, f"{name}.lua must start with #!lua and a header"
        self.flags = (match["flags"] or "").split(",")
        self.body = match["body"]
        self.summary: str = match["header"].partition("\n\nKEYS")[0]
        # What is indented continues the field.
        self.fields: dict[str, str] = dict(
            re.findall(r"^(KEYS|ARGV|Reply|Cost|Error) +(\S.*(?:\n +.*)*)", match["header"], re.MULTILINE)
        )

    def slots(self, field: str) -> tuple[str, ...]:
        """Give the names in KEYS or ARGV; a remark in brackets is no name."""
        if self.fields[field] == "none":
            return ()
        return tuple(name.strip() for name in re.sub(r"\([^)]*\)", "", self.fields[field]).split(","))

    def optional(self) -> list[str]:
        """Give the arguments that may be empty, as a remark says, and have only such after them."""
        remarks = re.findall(r"(\w+)(?: \(([^)]*)\))?(?:,|$)", self.fields["ARGV"])
        first = len(remarks)
        while first and "'' =" in remarks[first - 1][1]:
            first -= 1
        return [name for name, _ in remarks[first:]]

    def bindings(self) -> list[tuple[str, str, int]]:
        """Give (local's name, KEYS or ARGV, number) for each slot, as the Lua code binds it."""
        bound = []
        rest = re.search(r"^local (\w+) = \{unpack\((KEYS|ARGV), (\d+)\)\}$", self.body, re.MULTILINE)
        for names, values in re.findall(r"^local ([\w, ]+) = (.*(?:KEYS|ARGV)\[.*)$", self.body, re.MULTILINE):
            for name, value in zip(names.split(", "), values.split(", "), strict=True):
                slot = re.fullmatch(r"(?:tonumber\()?(KEYS|ARGV)\[(\d+)\]\)?( or '')?", value)
                assert slot, f"{name} = {value} binds no slot"
                assert bool(slot[3]) is (name in self.optional()), f"{name} may be left out, or may not"
                bound.append((name, slot[1], int(slot[2])))
        return bound + ([(rest[1], rest[2], int(rest[3]))] if rest else [])


def test_every_script_has_a_file_and_every_file_a_script() -> None:
    assert sorted(SCRIPTS) == sorted(file.stem for file in LUA.glob("*.lua"))


@every_script
class TestHeader:
    """What a script's header says is what its code does and what Python sends."""

    def test_it_says_what_the_script_does_answers_and_costs(self, name: str) -> None:
        header = Header(name)
        assert re.fullmatch(r"[A-Z].*\.", header.summary, re.DOTALL)
        assert list(header.fields) in (["KEYS", "ARGV", "Reply", "Cost"], ["KEYS", "ARGV", "Reply", "Cost", "Error"])
        assert header.fields["Cost"].startswith("O(")

    def test_it_names_the_keys_and_arguments_that_python_sends(self, name: str) -> None:
        header = Header(name)
        assert header.slots("KEYS") == SCRIPTS[name].keys
        assert header.slots("ARGV") == SCRIPTS[name].arguments

    def test_one_block_binds_every_slot_to_its_name_and_nothing_else_reads_them(self, name: str) -> None:
        header = Header(name)
        keys = [(f"{key}_key", "KEYS", number) for number, key in enumerate(SCRIPTS[name].keys, 1) if key != "absent"]
        arguments = [(argument, "ARGV", number) for number, argument in enumerate(SCRIPTS[name].arguments, 1)]
        assert header.bindings() == keys + arguments
        assert len(re.findall(r"\b(?:KEYS|ARGV)\b", SCRIPTS[name].source)) == len(keys + arguments)

    def test_it_carries_no_writes_if_and_only_if_it_writes_nothing(self, name: str, client: redis.Redis) -> None:
        code = re.sub(r"--.*", "", SCRIPTS[name].source).replace("local call = redis.call", "")
        calls = re.findall(r"\bcall\(\s*'(\w+)'", code)
        assert len(re.findall(r"\bp?call\b", code)) == len(calls)
        commands = set(calls)
        known: dict[str, Any] = client.command()
        writes = {command for command in commands if "write" in known[command.lower()]["flags"]}
        assert commands
        assert ("no-writes" in Header(name).flags) is (not writes)


@every_script
def test_the_server_gets_the_code_without_the_comments(name: str) -> None:
    spliced = splice(LUA, name).splitlines()
    header_end = spliced.index("]]")
    code = [line for line in spliced[header_end + 1 :] if line and not line.lstrip().startswith("--")]
    assert SCRIPTS[name].source.splitlines() == [spliced[0], *code]
    assert "--" not in SCRIPTS[name].source  # Nor is there one behind code.


@every_script
def test_the_sha_is_the_one_that_the_server_computes(name: str, client: redis.Redis) -> None:
    loaded: Any = client.script_load(SCRIPTS[name].source)
    assert SCRIPTS[name].sha == (loaded if isinstance(loaded, str) else loaded.decode())


@pytest.mark.parametrize("include", INCLUDES)
class TestInclude:
    """An include is one function or one value of the same name, which some script uses."""

    def test_some_script_uses_it(self, include: str) -> None:
        texts = [file.read_text(encoding="utf-8") for file in LUA.rglob("*.lua")]
        assert any(f"-- @include {include}\n" in text for text in texts)

    def test_it_defines_one_function_or_value_of_its_name(self, include: str) -> None:
        text = (LUA / "include" / f"{include}.lua").read_text(encoding="utf-8")
        [definition] = re.findall(r"^(?!end$|\)$|--|  |$).*", text, re.MULTILINE)
        assert definition.startswith((f"local function {include}(", f"local {include} = "))

    def test_it_leans_on_no_slot_of_its_includer(self, include: str) -> None:
        text = (LUA / "include" / f"{include}.lua").read_text(encoding="utf-8")
        assert not re.search(r"\b(?:KEYS|ARGV)\b", text)


@pytest.mark.parametrize(
    ("include", "milliseconds"), [("retention_ms", RETENTION_MS), ("kept_ms", 1000 * operations.KEPT_SECONDS)]
)
def test_lua_and_python_agree_on_a_duration(include: str, milliseconds: int, client: redis.Redis) -> None:
    source = (LUA / "include" / f"{include}.lua").read_text(encoding="utf-8")
    assert client.eval(f"{source} return tonumber({include})", 0) == milliseconds


@pytest.mark.parametrize("file", [*SCRIPTS, *(f"include/{include}" for include in INCLUDES)])
def test_a_file_uses_each_include_that_it_asks_for(file: str) -> None:
    text = (LUA / f"{file}.lua").read_text(encoding="utf-8")
    code = re.sub(r"--.*", "", text.partition("\n]]\n")[2] or text)
    for include in re.findall(r"^ *-- @include (\w+)$", text, re.MULTILINE):
        assert re.search(rf"\b{include}\b", code)


SAMPLES: dict[str, Any] = {
    "sids": ["sid"],
    "user_ids": ["user"],
    "game_ids": ["game"],
    "server_id": "server",
    "metadata": b"metadata",
    "position": replies.Position("7-0", 3),
    "sid": "sid",
    "user_id": "user",
    "current_user_id": "user",
    "game_id": "game",
    "threshold_seconds": None,
}

EXPECTED_KEYS = {
    "conn": b"{ns}:conn:sid",
    "user_conns": b"{ns}:user_conns:user",
    "game_conns": b"{ns}:game_conns:game",
    "last_seen": b"{ns}:last_seen",
    "servers": b"{ns}:servers",
    "events": b"{ns}:events",
    "reply": b"{ns}:reply:<token>",
    "absent": b"{ns}:absent",
}

EXPECTED_ARGUMENTS = {
    "user_id": b"user",
    "conn_ttl_ms": b"60000",
    "key_lifetime_ms": b"%d" % (60_000 + RETENTION_MS),
    "threshold_ms": b"21000",
    "connections_per_user": b"2",
    "batch_size": b"%d" % CLEANUP_BATCH_SIZE,
    "epoch": b"",
    "keep": b"",
    "grace_ms": b"0",
    "capacity": b"",
    "sids": b"sid",
    "reject_ms": b"21000",
    "resumes": b"",
    "user_ids": b"user",
    "game_ids": b"game",
    "server": b"9:server",
    "server_threshold_ms": b"21000",
    "server_grace_ms": b"5000",
    "events": b"77",
    "after_id": b"7-0",
    "after_number": b"3",
    "limit": b"%d" % operations.EVENTS_BATCH_SIZE,
    "again": b"",
    "not_after_ms": b"",
    "newest_start": b"",
}


DIFFERENT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "register_connection": {"metadata": b""},
    "update_metadata": {"metadata": b"metadata"},
    "cleanup_batch": {"server_id": b""},
    "cleanup_server_batch": {"server_id": b"server", "threshold_ms": b"0", "newest_start": b"9"},
    "start_server": {"server_id": b"server"},
}


def described() -> Iterator[tuple[str, Operation[Any]]]:
    """Make an operation with each method of Operations that describes one."""
    made = Operations(
        "ns",
        conn_ttl_seconds=60,
        heartbeat_seconds=7,
        connections_per_user=2,
        displacement="reject_while_alive",
        server_id="server",
        server_grace_seconds=5,
        events="stream",
        events_max_length=77,
    )
    made.boot_epoch = 9
    for name, method in inspect.getmembers(made, inspect.ismethod):
        if name.startswith("_") or name.endswith("_batches"):
            continue
        required = [
            parameter
            for parameter, about in inspect.signature(method).parameters.items()
            if about.default is inspect.Parameter.empty
        ]
        yield name, method(*(SAMPLES[parameter] for parameter in required))


DESCRIBED = dict(described())


@pytest.mark.parametrize("name", DESCRIBED)
class TestOperation:
    """Every operation sends what its script declares, slot by slot."""

    def test_it_sends_the_declared_keys(self, name: str) -> None:
        operation = DESCRIBED[name]
        keys = tuple(re.sub(rb"reply:[\w+/]{12}$", b"reply:<token>", key) for key in operation.keys)
        assert keys == tuple(EXPECTED_KEYS[key] for key in operation.script.keys)

    def test_it_sends_the_declared_arguments(self, name: str) -> None:
        operation = DESCRIBED[name]
        expected = EXPECTED_ARGUMENTS | DIFFERENT_ARGUMENTS.get(name, {})
        assert operation.arguments == tuple(expected[argument] for argument in operation.script.arguments)

    @pytest.mark.parametrize("reply", [7, -7, None, b"", b"x", [], [7], [None], [b"x", b"x"], {b"x": 7}], ids=repr)
    def test_it_makes_of_a_reply_of_another_kind_an_error_of_presence_if_any(self, name: str, reply: object) -> None:
        with suppress(presence.UnexpectedReplyError):
            DESCRIBED[name].result(reply)

    def test_it_is_one_evalsha_without_the_empty_arguments_at_its_end(self, name: str) -> None:
        operation = DESCRIBED[name]
        number = b"%d" % len(operation.keys)
        all_of_it = ("EVALSHA", operation.script.sha.encode(), number, *operation.keys, *operation.arguments)
        sent = operation.command()
        assert sent == all_of_it[: len(sent)]
        assert sent[-1] != b""
        assert {type(part) for part in sent[1:]} == {bytes}
        assert set(all_of_it[len(sent) :]) <= {b""}
        assert len(all_of_it) - len(sent) <= len(Header(operation.script.name).optional())


@pytest.mark.parametrize(
    ("operation", "count"),
    [
        (Operations("ns").register_connection("sid", "user"), 1),
        (Operations("ns", connections_per_user=2).register_connection("sid", "user"), 2),
        (Operations("ns").register_connection("sid", "user", metadata="m"), 5),
        (Operations("ns", events="pubsub").register_connection("sid", "user"), 6),
        (Operations("ns", displacement="newest_resumes").register_connection("sid", "user"), 7),
        (Operations("ns").join_game("sid", "game"), 1),
        (Operations("ns").update_heartbeat("sid"), 1),
        (Operations("ns").update_heartbeat("sid", epoch=0), 2),
        (Operations("ns").unregister_connection("sid"), 2),
        (Operations("ns").cleanup_batch(), 5),
        (Operations("ns").cleanup_batch(not_after_ms=0), 9),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else value.script.name,
)
def test_a_usual_call_sends_no_empty_arguments_and_a_zero_is_not_empty(operation: Operation[Any], count: int) -> None:
    assert len(operation.command()) == len(("EVALSHA", "sha", "number")) + len(operation.keys) + count


def test_every_script_is_used_by_an_operation() -> None:
    assert {operation.script.name for operation in DESCRIBED.values()} == set(SCRIPTS)


def test_cleanup_sends_its_batches_and_nothing_else() -> None:
    batches = [Operations("ns").cleanup_batch(), Operations("ns").cleanup_batch()]
    exchange = clean_up(iter(batches).__next__)
    assert next(exchange) == [batches[0].command()]
    assert exchange.send([[1, CLEANUP_BATCH_SIZE]]) == [batches[1].command()]
    with pytest.raises(StopIteration):
        exchange.send([[1, CLEANUP_BATCH_SIZE - 1]])


def public(manager: type) -> dict[str, Any]:
    return {
        "close" if name == "aclose" else name: getattr(member, "__func__", member)
        for name, member in vars(manager).items()
        if name == "__init__" or not name.startswith("_")
    }


ASYNCIO, BLOCKING = public(presence.ConnectionManager), public(presence.sync.ConnectionManager)


def without_asyncio(text: str) -> str:
    """Say what a text for asyncio says in words of blocking code."""
    for word, replacement in {
        "async with": "with",
        "async for": "for",
        "AsyncSubscription": "Subscription",
        "await ": "",
        "awaited": "called",
        "aclose": "close",
        "of this event loop": "of other threads",
        "Awaitable[object] | None": "object",
        "Coroutine[Any, Any, None]": "None",
    }.items():
        text = text.replace(word, replacement)
    return text


def test_the_managers_have_the_same_methods() -> None:
    assert list(ASYNCIO) == list(BLOCKING)


NOT_COROUTINE_FUNCTIONS = {"__init__", "from_url", "subscribe", "run_cleanup", "run_server_heartbeat"}
"""The last two give a coroutine, but notice at once what they are given and whether the manager is closed."""


@pytest.mark.parametrize("name", ASYNCIO)
class TestParity:
    """The asyncio and the blocking manager differ in nothing but ``await``."""

    def test_the_signatures_are_equal(self, name: str) -> None:
        assert without_asyncio(str(inspect.signature(ASYNCIO[name]))) == str(inspect.signature(BLOCKING[name]))

    def test_the_docstrings_are_equal(self, name: str) -> None:
        about, twin = inspect.getdoc(ASYNCIO[name]) or "", inspect.getdoc(BLOCKING[name]) or ""
        if name == "run_cleanup":  # A task is not a thread; what it takes and costs is the same.
            about, twin = about.partition("Args:")[2], twin.partition("Args:")[2]
        if name == "run_server_heartbeat":
            twin = twin.replace(" On a manager\nthat is closed already it ends at once, and logs an error.", "")
        assert twin
        assert without_asyncio(about) == twin

    def test_only_the_asyncio_manager_is_awaited(self, name: str) -> None:
        assert inspect.iscoroutinefunction(ASYNCIO[name]) is (name not in NOT_COROUTINE_FUNCTIONS)
        assert not inspect.iscoroutinefunction(BLOCKING[name])


DESCRIBED_AS = {
    **{name: name for name in BLOCKING.keys() - {"__init__"} if hasattr(Operations, name)},
    "cleanup_stale_connections": "cleanup_batch",
    "cleanup_server": "cleanup_server_batch",
}


@pytest.mark.parametrize("name", sorted(DESCRIBED_AS))
def test_every_operation_of_a_manager_is_described_with_the_same_arguments(name: str) -> None:
    described = inspect.signature(getattr(Operations, DESCRIBED_AS[name]))
    arguments = [argument for argument in described.parameters.values() if argument.name != "not_after_ms"]
    assert arguments == list(inspect.signature(BLOCKING[name]).parameters.values())
