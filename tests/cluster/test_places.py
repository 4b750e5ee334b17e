"""A whole cluster where there is only IPv6: coordinator, stores, ranks over gloo, and a gateway."""

from pathlib import Path

import pytest

from services.cli.drill import Options, stream_all
from services.cli.local import LocalCluster
from tests.cluster.conftest import SERVING_S, settings
from tests.pure.test_sockets import has_ipv6

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")]


async def test_a_cluster_on_ipv6_serves_and_protects(small_model_dir: Path) -> None:
    here = ["--host", "::1"]
    extra = {"coordinator": [*here, "--communicator", "gloo"], "parity-store": here}
    async with LocalCluster(
        settings(host="::1", tp=2, spares=0, record=False), small_model_dir, extra=extra
    ) as cluster:
        status = await cluster.wait_serving(SERVING_S)
        addresses = [child.address for child in cluster.processes.values() if child.address]
        addresses += [status["stores"][0]["bulk_address"], status["stores"][0]["admin_url"]]
        assert all("[::1]:" in address for address in addresses)
        streams = await stream_all(cluster, [[5 + place for place in range(40)]], Options(max_tokens=8), "ipv6")
        assert len(streams[0].tokens) == 8
        await cluster.wait_protected(30)
        assert (await cluster.status())["stripes_protected"] > 0
