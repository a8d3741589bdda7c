"""Entry point ``vllm.general_plugins``: makes ``KVRouteConnector`` known by name in every process of vLLM."""

from __future__ import annotations

NAME = "KVRouteConnector"


def register() -> None:
    """Register the connector; a second call does nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvroute.serving.connector", NAME)
