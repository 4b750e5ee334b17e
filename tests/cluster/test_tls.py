"""TLS by certificate files: coordinator, store and gateway with certificates of a self-made authority."""

import asyncio
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from services.coordinator.app import run as run_coordinator
from services.gateway.app import run as run_gateway
from services.parity_store.app import run as run_store
from shared.channel import dial
from shared.config import CoordinatorSettings, GatewaySettings, ParityStoreSettings
from shared.errors import ConfigError, PeerLost
from shared.messages import GatewayHello
from shared.stripe_index import StripeIndex
from shared.tls import client_context, pinned_context, server_context
from tests.cluster.store_harness import DEADLINE_S, until
from tests.conformance.test_stripe_index import server

TOKEN = "a token of the cluster"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The settings that name an authority, and a certificate for 127.0.0.1 by it."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    trustme.CA().cert_pem.write_to_path(folder / "stranger.pem")
    names = {"tls_ca_file": "ca.pem", "tls_cert_file": "cert.pem", "tls_key_file": "key.pem"}
    return {name: str(folder / file) for name, file in names.items()}


@asynccontextmanager
async def service(run: Any, settings: Any) -> AsyncIterator[str]:
    """A service within this process; yields its address. It must end without an error."""
    stop = asyncio.Event()
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run(settings, stop, address.set_result))
    try:
        await asyncio.wait([task, address], timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        yield address.result()
    finally:
        stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await task


async def test_services_find_each_other_over_tls_and_strangers_do_not(files: dict[str, str], redis_url: str) -> None:
    common: dict[str, Any] = {"token": TOKEN, "port": 0, **files}
    tls = client_context(files["tls_ca_file"])
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        service(run_coordinator, CoordinatorSettings(redis_url=redis_url, group="tls", **common)) as url,
        service(
            run_store, ParityStoreSettings(redis_url=redis_url, coordinator_url=url, capacity_mb=8, **common)
        ) as admin,
        service(run_gateway, GatewaySettings(coordinator_url=url, **common)) as gateway,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), headers=headers) as session,
    ):
        assert (url[:6], admin[:8], gateway[:8]) == ("wss://", "https://", "https://")

        async def are_connected() -> bool:
            async with session.get(admin + "/health") as store, session.get(gateway + "/health") as status:
                return store.status == 200 and "waiting for 3 more worker" in await status.text()

        await until(are_connected)
        with pytest.raises(PeerLost, match="certificate verify failed"):
            async with dial(url, TOKEN, lambda _: GatewayHello("x"), DEADLINE_S):
                pass
        stranger = client_context(str(Path(files["tls_ca_file"]).with_name("stranger.pem")))
        for address in (admin, gateway):
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await session.get(address + "/live", ssl=stranger)
            with pytest.raises(aiohttp.ClientError):
                await session.get(address.replace("https", "http") + "/live")
        assert (await session.get(gateway + "/live", ssl=pinned_context(files["tls_cert_file"]))).status == 200
        for authority, code, said in ((files["tls_ca_file"], 0, "capacity_bytes"), ("", 1, "CERTIFICATE_VERIFY")):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.cli", "store", "status", "--url", admin, "--json"),
                env={"GHOST_TOKEN": TOKEN, "GHOST_TLS_CA_FILE": authority, "PYTHONPATH": ":".join(sys.path)},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            assert (process.returncode, said in output.decode()) == (code, True), output.decode()


def test_files_that_can_not_be_used_are_a_config_error_that_names_them(files: dict[str, str]) -> None:
    for change in ({"tls_cert_file": "/nowhere.pem"}, {"tls_key_file": files["tls_ca_file"]}):
        with pytest.raises(ConfigError, match=next(iter(change.values()))):
            server_context(GatewaySettings(**{**files, **change}))
    with pytest.raises(ConfigError, match="/nowhere"):
        client_context("/nowhere.pem")
    assert server_context(GatewaySettings()) is None


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="REDIS-SERVER IS NOT INSTALLED: no index over TLS")
async def test_the_index_works_over_tls_with_a_password(files: dict[str, str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    flags = ("--tls-port", str(port), "--tls-cert-file", files["tls_cert_file"], "--tls-key-file",
             files["tls_key_file"], "--tls-ca-cert-file", files["tls_ca_file"], "--tls-auth-clients", "no",
             "--requirepass", "s3cr3t")  # fmt: skip
    with server("redis-server", tmp_path, *flags):
        url = f"rediss://:s3cr3t@127.0.0.1:{port}/0"
        async with StripeIndex(f"{url}?ssl_ca_certs={files['tls_ca_file']}") as index:
            assert await index.advance_epoch("g") == 1
        async with StripeIndex(url) as index:
            with pytest.raises(PeerLost, match="certificate verify failed"):
                await index.epoch("g")
