"""peft's adapter layers in a network (`lockstep.models.adapters` defines adapters)."""

from __future__ import annotations

from torch import nn

from lockstep.models.adapters import Adapter
from lockstep_torch.network import Network, copy_network


def linear_layers(network: Network) -> dict[str, nn.Module]:
    """{name: layer} of the layers that an adapter may adapt: linear ones, including GPT-2's Conv1D, but no heads."""
    kinds, head = ("Linear", "Conv1D"), network.language_head()
    return {n: m for n, m in network.named_modules() if type(m).__name__ in kinds and m is not head}


def adapted(network: Network, adapter: Adapter) -> Network:
    """A copy with peft's adapter layers. The weights of ``network``, which are frozen, are shared, not copied."""
    from peft import LoraConfig, inject_adapter_in_model

    network = copy_network(network)
    settings = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets), fan_in_fan_out=adapter.conv1d
    )
    network = inject_adapter_in_model(settings, network)
    network.adapter = adapter
    return network
