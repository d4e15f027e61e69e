"""The ways in which a server is deployed: ACL, unix socket, TLS, sentinels. Every operation works in each."""

from __future__ import annotations

import asyncio
import re
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

import pytest
import redis
import redis.asyncio

import presence
import presence.sync
from presence import addresses, clients
from presence.scripts import lua_folder
from tests.fault_calls import CALLS, READS, call, check, play, set_the_scene
from tests.fault_proxy import Fate, Proxy
from tests.fault_tls import server_context, write_certificate
from tests.rights import LEAST_RIGHTS, MORE_FOR_ANOTHER_DATABASE, MORE_TO_SUBSCRIBE, RIGHTS_ON_SENTINELS
from tests.server import LocalServer, free_port, program
from tests.subscribed import MODES, subscribed
from tests.watching import admin, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from presence.sync import ConnectionManager
    from tests.conftest import ManagerFactory


class TestAnACLUserWithTheLeastRights:
    """The rights that the README lists are enough, none of them is needless, and they lead to no other key."""

    @pytest.fixture
    def user_url(self, own_server: LocalServer) -> str:
        with admin(own_server) as client:
            client.execute_command("ACL", "SETUSER", "game-server", "on", ">password", *LEAST_RIGHTS)
        return f"redis://game-server:password@127.0.0.1:{own_server.port}/0"

    @pytest.mark.parametrize("protocol", [2, 3])
    def test_can_run_every_operation(self, make_manager: ManagerFactory, user_url: str, protocol: int) -> None:
        manager = make_manager(f"{user_url}?protocol={protocol}", namespace="presence")
        play(manager)
        assert manager.pipeline([manager.operations.get_connection_count()] * 2) == [2, 2]

    def test_has_the_commands_that_the_scripts_call_and_no_other(self) -> None:
        files = Path(str(lua_folder())).rglob("*.lua")
        called = {name for file in files for name in re.findall(r"\bcall\(\s*'(\w+)'", file.read_text())}
        commands = [f"+{name.lower()}" for name in sorted(called)]
        assert ["~{presence}:*", "&{presence}:*", "+evalsha", "+script|load", *commands] == LEAST_RIGHTS

    @pytest.mark.parametrize("mode", MORE_TO_SUBSCRIBE)
    def test_can_subscribe_with_the_rights_listed_for_that(
        self, make_manager: ManagerFactory, user_url: str, own_server: LocalServer, hasty: dict[str, Any], mode: str
    ) -> None:
        manager = make_manager(user_url, namespace="presence", events=mode, **hasty)
        with pytest.raises(presence.PermissionDeniedError), subscribed(manager) as events:
            events.next()
        with admin(own_server) as client:
            client.execute_command("ACL", "SETUSER", "game-server", *MORE_TO_SUBSCRIBE[mode])
        with subscribed(manager) as events:
            manager.register_connection("sid-1", "user-1")
            assert events.next().connection.sid == "sid-1"

    def test_can_use_another_database_with_the_right_listed_for_that(
        self, make_manager: ManagerFactory, user_url: str, own_server: LocalServer, hasty: dict[str, Any]
    ) -> None:
        manager = make_manager(f"{user_url.removesuffix('/0')}/1", namespace="presence", **hasty)
        with pytest.raises(presence.PermissionDeniedError, match="select"):
            manager.get_connection_count()
        with admin(own_server) as client:
            client.execute_command("ACL", "SETUSER", "game-server", *MORE_FOR_ANOTHER_DATABASE)
        play(manager)

    def test_cannot_touch_another_namespace(
        self, make_manager: ManagerFactory, user_url: str, hasty: dict[str, Any]
    ) -> None:
        for namespace in ("other", "presence2", "p"):
            manager = make_manager(user_url, namespace=namespace, **hasty)
            for name in CALLS:
                with pytest.raises(presence.PermissionDeniedError, match="README lists the rights"):
                    call(manager, name)

    def test_cannot_touch_another_key_or_run_another_command(self, user_url: str) -> None:
        with redis.Redis.from_url(user_url) as client:
            for command in (("HGETALL", "foreign"), ("ZPOPMIN", "{presence}:last_seen"), ("FLUSHALL",), ("KEYS", "*")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.execute_command(*command)
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.eval("return redis.call('HGETALL', 'foreign')", 0)


class TestAUnixSocket:
    """unix:// leads to it."""

    @pytest.fixture
    def socket_url(self) -> Iterator[str]:
        # In /tmp, because the path of a socket must be short: 104 bytes on macOS.
        with (
            tempfile.TemporaryDirectory(dir="/tmp") as folder,
            LocalServer(program(), "--unixsocket", f"{folder}/socket"),
        ):
            yield f"unix://{folder}/socket"

    def test_serves_every_operation(self, make_manager: ManagerFactory, socket_url: str) -> None:
        play(make_manager(socket_url))

    def test_that_is_not_there_is_named(self, make_manager: ManagerFactory, hasty: dict[str, Any]) -> None:
        manager = make_manager("unix:///tmp/presence/no/such/socket", **hasty)
        with pytest.raises(presence.ServerUnreachableError, match=r"check that it runs.*No such file"):
            manager.get_connection_count()


class TestTLSThatFails:
    """The error names what TLS is about."""

    def test_since_the_certificate_is_not_trusted(
        self, make_manager: ManagerFactory, own_server: LocalServer, tmp_path: Path, hasty: dict[str, Any]
    ) -> None:
        with Proxy(own_server.port, tls=server_context(tmp_path)) as proxy:
            manager = make_manager(proxy.url, **hasty)
            with pytest.raises(presence.ServerUnreachableError, match=r"certificate is not trusted.*ssl_ca_certs"):
                manager.get_connection_count()

    def test_since_a_file_is_not_there(
        self, make_manager: ManagerFactory, own_server: LocalServer, tmp_path: Path, hasty: dict[str, Any]
    ) -> None:
        with Proxy(own_server.port, tls=server_context(tmp_path)) as proxy:
            manager = make_manager(f"{proxy.url}?ssl_ca_certs=/nowhere.pem", **hasty)
            with pytest.raises(presence.ServerUnreachableError, match="a file that the URL names is not there"):
                manager.get_connection_count()

    def test_since_only_one_side_speaks_it(
        self, make_manager: ManagerFactory, own_server: LocalServer, tmp_path: Path, hasty: dict[str, Any]
    ) -> None:
        timeouts = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}
        with Proxy(own_server.port, tls=server_context(tmp_path)) as proxy:
            for url in (proxy.url.replace("rediss", "redis"), f"rediss://127.0.0.1:{own_server.port}"):
                manager = make_manager(url, **timeouts, **hasty)
                with pytest.raises(presence.ServerUnreachableError, match="rediss:// for a server with TLS"):
                    manager.get_connection_count()


class TestTLS:
    """rediss:// encrypts, and trusts only the certificates that it is told to trust."""

    @pytest.fixture
    def secured(self, own_server: LocalServer, tmp_path: Path) -> Iterator[Proxy]:
        """A proxy that takes the encryption off in front of the server, as is usual where the server has none."""
        with Proxy(own_server.port, tls=server_context(tmp_path)) as proxy:
            yield proxy

    def test_serves_every_operation(self, make_manager: ManagerFactory, secured: Proxy, tmp_path: Path) -> None:
        manager = make_manager(f"{secured.url}?ssl_ca_certs={write_certificate(tmp_path)}")
        play(manager)
        manager.close()

    @pytest.mark.parametrize("mode", MODES)
    def test_carries_events(self, make_manager: ManagerFactory, secured: Proxy, tmp_path: Path, mode: str) -> None:
        manager = make_manager(f"{secured.url}?ssl_ca_certs={write_certificate(tmp_path)}", events=mode)
        with subscribed(manager) as events, subscribed(manager, user_id="user-2") as of_user:
            before = secured.accepted
            set_the_scene(manager)
            assert [event.connection.sid for event in events.take(6)] == ["sid-1"] * 3 + ["sid-2"] * 3
            assert [event.connection.sid for event in of_user.take(3)] == ["sid-2"] * 3
            assert secured.accepted == before, "no connection was opened anew"
        manager.close()

    def test_ends_without_an_error_where_the_other_end_is_gone(
        self, make_manager: ManagerFactory, secured: Proxy, tmp_path: Path
    ) -> None:
        """redis-py's asyncio client waits for the other end's farewell, and raises when none comes."""
        certificate = write_certificate(tmp_path)
        with Proxy(secured.port) as network:
            url = f"rediss://127.0.0.1:{network.port}/0?ssl_ca_certs={certificate}"
            manager = make_manager(url, socket_connect_timeout=0.3)
            manager.register_connection("sid", "user")
            network.is_silent = True
            manager.close()
            network.is_silent = False
            assert manager.update_heartbeat("sid")
            manager.close()

    def test_refuses_a_certificate_that_nobody_vouches_for(
        self, make_manager: ManagerFactory, secured: Proxy, hasty: dict[str, Any]
    ) -> None:
        manager = make_manager(secured.url, **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            manager.get_connection_count()

    def test_refuses_a_certificate_for_another_host(
        self, make_manager: ManagerFactory, secured: Proxy, tmp_path: Path, hasty: dict[str, Any]
    ) -> None:
        certificate = write_certificate(tmp_path)
        manager = make_manager(f"rediss://localhost:{secured.port}/0?ssl_ca_certs={certificate}", **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            manager.get_connection_count()


class Sentinels:
    """A primary, a replica, and a sentinel that watches them."""

    OPTIONS = ("--repl-diskless-sync-delay", "0")

    def __init__(self, folder: Path) -> None:
        self.primary, self.replica = (LocalServer(program(), *self.OPTIONS) for _ in range(2))
        config = folder / "sentinel.conf"
        config.write_text(
            f"sentinel monitor game 127.0.0.1 {self.primary.port} 1\n"
            "sentinel down-after-milliseconds game 300\n"
            "sentinel failover-timeout game 3000\n"
        )
        self.sentinel = LocalServer(program(), "--sentinel", config=config)

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/game"

    @contextmanager
    def running(self) -> Iterator[Sentinels]:
        with self.primary, self.replica:
            with admin(self.replica) as replica:
                replica.replicaof("127.0.0.1", str(self.primary.port))
                wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
            with self.sentinel, admin(self.sentinel) as sentinel:
                wait_until(lambda: len(sentinel.execute_command("SENTINEL", "REPLICAS", "game")) == 1)
                yield self

    def replicate(self) -> None:
        """Wait until the replica has everything."""
        with admin(self.primary) as primary, admin(self.replica) as replica:
            written = primary.info("replication")["master_repl_offset"]
            wait_until(lambda: replica.info("replication")["slave_repl_offset"] >= written)

    def fail_over(self, how: str) -> None:
        """Let the replica, once it has everything, be the primary: on demand, or after a crash of the other."""
        self.replicate()
        if how == "crash":
            self.primary.kill()
            self.wait_for_the_new_primary()
        else:
            self._fail_over_on_demand()
            self._demote_the_old_primary()

    def _fail_over_on_demand(self) -> None:
        """Ask the sentinel for a failover until it has happened: it gives one up that takes three seconds."""
        with admin(self.sentinel) as sentinel:

            def has_happened() -> bool:
                if self._names_the_replica(sentinel):
                    return True
                try:
                    sentinel.execute_command("SENTINEL", "FAILOVER", "game")
                except redis.ResponseError as error:
                    if not str(error).startswith(("NOGOODSLAVE", "INPROG")):
                        raise
                return False

            wait_until(has_happened)
        self.wait_for_the_new_primary()

    def wait_for_the_new_primary(self) -> None:
        with admin(self.sentinel) as sentinel, admin(self.replica) as replica:
            wait_until(lambda: self._names_the_replica(sentinel))
            wait_until(lambda: replica.info("replication")["role"] == "master")

    def _names_the_replica(self, sentinel: Any) -> bool:
        primary: list[str] = sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "game")
        return primary == ["127.0.0.1", str(self.replica.port)]

    def _demote_the_old_primary(self) -> None:
        """Do at once what the sentinel does within ten seconds."""
        with admin(self.primary) as primary:
            primary.replicaof("127.0.0.1", str(self.replica.port))
            for kind in ("normal", "pubsub"):
                primary.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    with Sentinels(tmp_path_factory.mktemp("sentinel")).running() as sentinels:
        yield sentinels


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    """Those of a test that lets them fail over."""
    with Sentinels(tmp_path).running() as sentinels:
        yield sentinels


every_failover = pytest.mark.parametrize("how", ["demand", "crash"])


class TestSentinel:
    """redis+sentinel:// leads to the primary, whichever server that is."""

    def test_leads_every_operation_to_the_primary(self, make_manager: ManagerFactory, steady: Sentinels) -> None:
        play(make_manager(steady.url))

    def test_that_is_down_is_passed_over_for_the_next(self, make_manager: ManagerFactory, steady: Sentinels) -> None:
        # Nobody listens on the port behind the proxy, and while it is held, the proxy cannot be given it for itself.
        held = socket.socket()
        held.bind(("127.0.0.1", 0))
        with held, Proxy(held.getsockname()[1]) as broken:
            manager = make_manager(f"redis+sentinel://127.0.0.1:{broken.port},127.0.0.1:{steady.sentinel.port}/game")
            assert manager.get_connection_count() == 0
            assert broken.accepted == 1, "it is asked once, not again and again"

    @pytest.mark.parametrize("kind", ["asyncio", "blocking"])
    def test_that_was_down_is_asked_again_when_the_others_are(
        self, steady: Sentinels, namespace: str, kind: str
    ) -> None:
        """However many have looked for the primary meanwhile: redis-py would forget it."""
        with ExitStack() as stack:
            first, *others = proxies = [stack.enter_context(Proxy(steady.sentinel.port)) for _ in range(3)]
            url = "redis+sentinel://" + ",".join(f"127.0.0.1:{proxy.port}" for proxy in proxies) + "/game"
            options: dict[str, Any] = {"namespace": namespace, "client_name": "manager"}
            others[0].delay = 0.1  # So that many ask it at once.
            for proxy in proxies:
                proxy.command = b"MASTERS"

            def change() -> None:
                """Let the others be down, and the primary be looked for again."""
                first.fates = []
                for other in others:
                    other.fates = [Fate.LOSE_REQUEST] * 1_000
                with admin(steady.primary) as primary:
                    for each in primary.client_list():
                        if each["name"] == "manager":
                            primary.client_kill_filter(each["id"])

            async def work() -> None:
                async with presence.ConnectionManager.from_url(url, events="pubsub", **options) as manager:
                    assert await manager.get_connection_count() == 0
                    first.fates = [Fate.LOSE_REQUEST] * 1_000
                    subscriptions = [manager.subscribe() for _ in range(8)]
                    await asyncio.gather(*(subscription.__aenter__() for subscription in subscriptions))
                    await asyncio.gather(*(subscription.aclose() for subscription in subscriptions))
                    change()
                    assert await manager.get_connection_count() == 0

            if kind == "asyncio":
                asyncio.run(work())
                return
            for _ in range(3):  # How many threads are late enough is up to chance.
                for other in others:
                    other.fates = []
                with presence.sync.ConnectionManager.from_url(url, **options) as manager:
                    first.fates = [Fate.LOSE_REQUEST] * 1_000
                    with ThreadPoolExecutor(16) as threads:
                        calls = [threads.submit(manager.get_connection_count) for _ in range(16)]
                    assert [call.result() for call in calls] == [0] * 16
                    change()
                    assert manager.get_connection_count() == 0

    def test_that_does_not_know_the_service_says_so(
        self, make_manager: ManagerFactory, steady: Sentinels, hasty: dict[str, Any]
    ) -> None:
        manager = make_manager(steady.url.replace("/game", "/gmae"), **hasty)
        with pytest.raises(presence.ServerUnreachableError, match=r"correct .* the service in.*No master.*'gmae'"):
            manager.get_connection_count()

    def test_leads_a_user_with_the_least_rights(
        self, make_manager: ManagerFactory, steady: Sentinels, hasty: dict[str, Any]
    ) -> None:
        url = f"{steady.url}?sentinel_username=watcher&sentinel_password=password"
        with admin(steady.sentinel) as sentinel:
            sentinel.execute_command("ACL", "SETUSER", "watcher", "reset", "on", ">password")
            manager = make_manager(url, **hasty)
            with pytest.raises(presence.PermissionDeniedError, match="README lists the rights"):
                manager.get_connection_count()
            refused = make_manager(url.replace("=password", "=wrong"), **hasty)
            with pytest.raises(presence.AuthenticationFailedError, match="correct sentinel_username and"):
                refused.get_connection_count()
            sentinel.execute_command("ACL", "SETUSER", "watcher", *RIGHTS_ON_SENTINELS)
            assert manager.get_connection_count() == 0

    def test_that_cannot_be_reached_is_named(self, make_manager: ManagerFactory, hasty: dict[str, Any]) -> None:
        manager = make_manager(f"redis+sentinel://127.0.0.1:{free_port()}/game", **hasty)
        with pytest.raises(presence.ServerUnreachableError, match="check that the sentinels run"):
            manager.get_connection_count()

    def test_serves_more_calls_at_once_than_connections(self, steady: Sentinels) -> None:
        ask_at_once(f"{steady.url}?max_connections=1")

    def test_with_tls_is_asked_with_the_options_of_the_url_or_of_the_call(
        self, make_manager: ManagerFactory, own_server: LocalServer, tmp_path: Path
    ) -> None:
        certificate = write_certificate(tmp_path)
        config = tmp_path / "sentinel.conf"
        with Proxy(own_server.port, tls=server_context(tmp_path)) as primary:
            # It cannot speak TLS, and is given too long a time to find that out.
            config.write_text(
                f"sentinel monitor game 127.0.0.1 {primary.port} 1\nsentinel down-after-milliseconds game 3600000\n"
            )
            with (
                LocalServer(program(), "--sentinel", config=config) as server,
                Proxy(server.port, tls=server_context(tmp_path)) as sentinel,
            ):
                url = f"rediss+sentinel://127.0.0.1:{sentinel.port}/game"
                managers = [
                    make_manager(f"{url}?ssl_ca_certs={certificate}"),
                    make_manager(url, ssl_ca_certs=str(certificate)),
                    make_manager(url.replace("rediss", "redis"), ssl=True, ssl_ca_certs=str(certificate)),
                ]
                for manager in managers:
                    before = sentinel.accepted
                    assert manager.get_connection_count() == 0
                    assert sentinel.accepted > before
                    manager.close()

    @pytest.mark.parametrize("is_traced", [False, True])
    def test_a_call_that_is_under_way_when_its_primary_dies_asks_for_the_new_one(
        self, make_manager: ManagerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_traced: bool
    ) -> None:
        """Where something wraps it, redis-py sends it again, and otherwise the manager."""
        if is_traced:
            execute_command: Any = redis.Redis.execute_command

            @wraps(execute_command)
            def traced(*args: Any, **options: Any) -> Any:
                return execute_command(*args, **options)

            monkeypatch.setattr(redis.Redis, "execute_command", traced)
        config = tmp_path / "sentinel.conf"
        with LocalServer(program()) as before, LocalServer(program()) as after:
            config.write_text(f"sentinel monitor game 127.0.0.1 {before.port} 1\n")
            with LocalServer(program(), "--sentinel", config=config) as server, admin(server) as sentinel:

                def fail_over() -> None:
                    sentinel.execute_command("SENTINEL", "REMOVE", "game")
                    sentinel.execute_command("SENTINEL", "MONITOR", "game", "127.0.0.1", after.port, 1)
                    before.kill()

                manager = make_manager(f"redis+sentinel://127.0.0.1:{server.port}/game")
                assert manager.get_connection_count() == 0
                with admin(before) as primary:
                    primary.client_pause(60_000)
                timer = Timer(0.2, fail_over)
                timer.start()
                assert manager.get_connection_count() == 0
                timer.join()


def ask_at_once(url: str, kinds: tuple[str, ...] = ("asyncio", "blocking")) -> None:
    """Ask more at once than there are connections; past the asyncio manager, whose calls share one."""

    async def run() -> None:
        client: Any = clients.connect_asyncio(addresses.parse(url), {})
        async with client:
            assert await asyncio.gather(*(client.exists("a key") for _ in range(50))) == [0] * 50

    if "asyncio" in kinds:
        asyncio.run(run())
    blocking: Any = clients.connect_blocking(addresses.parse(url), {})
    with blocking, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: blocking.exists("a key"), range(400))) == [0] * 400


class TestAFailoverBySentinel:
    """No caller notices it (guarantee 8)."""

    @pytest.fixture
    def managers(
        self, make_manager: ManagerFactory, sentinels: Sentinels, namespace: str
    ) -> dict[str, ConnectionManager]:
        """A manager for each operation, so that each of them is some manager's first after the failover."""
        managers = {name: make_manager(sentinels.url, namespace=f"{namespace} {name}") for name in (*CALLS, "pipeline")}
        for manager in managers.values():
            set_the_scene(manager)
        return managers

    @every_failover
    def test_leads_the_next_call_to_the_new_primary(
        self, sentinels: Sentinels, managers: dict[str, ConnectionManager], how: str
    ) -> None:
        sentinels.fail_over(how)
        piped = managers.pop("pipeline")
        beats = [piped.operations.update_heartbeat(sid) for sid in ("sid-1", "sid-2", "unknown")]
        assert piped.pipeline(beats) == [True, True, False]
        for name, manager in managers.items():
            if name in READS:  # An old primary that is still there would answer them: reading is not refused.
                check(manager, "update_heartbeat")
            check(manager, name)


class TestEventsAcrossAFailoverBySentinel:
    """The stream goes on: nothing missed of what was replicated, nothing twice. Through pub/sub, the loss is told."""

    @every_failover
    def test_the_stream_misses_nothing_and_repeats_nothing(
        self, make_manager: ManagerFactory, sentinels: Sentinels, how: str
    ) -> None:
        manager = make_manager(sentinels.url, events="stream")
        with subscribed(manager) as events, subscribed(manager, user_id="user 6") as of_user:
            for number in range(4):
                manager.register_connection(f"sid {number}", f"user {number}")
            seen = events.take(3)  # In the middle of a change: the rest of it comes after the failover.
            sentinels.fail_over(how)
            for number in range(4, 8):
                manager.register_connection(f"sid {number}", f"user {number}")
            seen += events.take(13)
            assert [event.connection.sid for event in seen[::2]] == [f"sid {number}" for number in range(8)]
            assert [event.type.value for event in seen] == ["registered", "user_online"] * 8
            assert [event.connection.sid for event in of_user.take(2)] == ["sid 6"] * 2
            with subscribed(manager, after=seen[2].position) as again:
                assert again.take(13) == seen[3:]

    def test_the_stream_tells_what_the_new_primary_never_had(
        self, make_manager: ManagerFactory, sentinels: Sentinels
    ) -> None:
        """Its number of entries may be reached again, but not with the entry of the position."""
        manager = make_manager(sentinels.url, events="stream")
        with subscribed(manager) as events:
            manager.register_connection("sid 0", "user 0")
            events.take(2)
            sentinels.replicate()
            with admin(sentinels.replica) as replica:
                replica.replicaof("NO", "ONE")  # What is written from now on is lost with the old primary.
                manager.register_connection("sid 1", "user 1")
                events.take(2)
                replica.replicaof("127.0.0.1", free_port())
            sentinels.primary.kill()
            with admin(sentinels.replica) as replica:
                replica.replicaof("NO", "ONE")
            sentinels.wait_for_the_new_primary()
            for number in range(2, 5):
                manager.register_connection(f"sid {number}", f"user {number}")
            with pytest.raises(presence.EventsLostError, match="another one now"):
                events.next()

    @every_failover
    def test_pubsub_gives_what_came_before_and_tells_the_loss(
        self, make_manager: ManagerFactory, sentinels: Sentinels, how: str
    ) -> None:
        manager = make_manager(sentinels.url, events="pubsub")
        with subscribed(manager) as events:
            manager.register_connection("sid 0", "user 0")
            sentinels.fail_over(how)
            manager.register_connection("sid 1", "user 1")
            assert [event.connection.sid for event in events.take(2)] == ["sid 0"] * 2
            events.tells_the_loss("the connection broke")
        with subscribed(manager) as events:
            manager.register_connection("sid 2", "user 2")
            assert events.next().connection.sid == "sid 2"
