"""The retaining heads of a whole model: made for it, checked against it, saved beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from locret._files import atomic_path, write_json
from locret.retaining_head import ACTIVATIONS, RetainingHead

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS, CONFIG = "heads.safetensors", "heads.json"


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What heads fit: the model's shape, and theirs.

    Args:
        layers, heads, kv_heads, head_dim, hidden_size: the model's.
        input: "qkv" reads [Q, K, V] before RoPE (the paper), "hidden" the attention's input.
        hidden: d_R; 0 for linear heads.
        activation: silu, gelu or relu.
        bias: whether the matrices have biases.
        query_aware: Locret-Q: trained on texts that begin with what will be asked of them.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    input: Literal["qkv", "hidden"] = "qkv"
    hidden: int = 1024
    activation: str = "silu"
    bias: bool = False
    query_aware: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model has."""
        for name in ("layers", "heads", "kv_heads", "head_dim", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.input not in ("qkv", "hidden"):
            raise ValueError(f'input must be "qkv" or "hidden", got {self.input!r}')

    @property
    def inputs(self) -> int:
        """Width of what a head reads."""
        if self.input == "hidden":
            return self.hidden_size
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def shape_of(model: PreTrainedModel) -> dict[str, int]:
    """The numbers of a decoder that heads depend on; see `shape_of_config`."""
    return shape_of_config(model.config)


def shape_of_config(config: PretrainedConfig) -> dict[str, int]:
    """The same from a configuration alone.

    Raises:
        ValueError: a configuration without layers or heads.
    """
    config = config.get_text_config(decoder=True)
    try:
        heads, hidden_size = config.num_attention_heads, config.hidden_size
        return {
            "layers": config.num_hidden_layers,
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or hidden_size // heads,
            "hidden_size": hidden_size,
        }
    except AttributeError as error:
        raise ValueError(
            f"{type(config).__name__} does not say its {error.name}: retaining heads need a "
            "transformers decoder"
        ) from error


class RetainingHeads(nn.Module):
    """One `RetainingHead` for each layer of a decoder.

    Args:
        config: sizes.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            RetainingHead(
                config.inputs, config.kv_heads, config.hidden, config.activation, config.bias
            )
            for _ in range(config.layers)
        )

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, *, hidden: int = 256, input: str = "hidden", bias: bool = True,
        query_aware: bool = False,
    ) -> RetainingHeads:  # fmt: skip
        """Untrained heads of the right shape; σ is the model's own where we know it."""
        activation = getattr(model.config.get_text_config(decoder=True), "hidden_act", "silu")
        return cls(
            HeadsConfig(
                **shape_of(model),
                input=input,  # type: ignore[arg-type]  # checked there
                hidden=hidden,
                activation=activation if activation in ACTIVATIONS else "silu",
                bias=bias,
                query_aware=query_aware,
            )
        )

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where these heads were made for a model of another shape."""
        for name, theirs in shape_of(model).items():
            ours = getattr(self.config, name)
            if ours != theirs:
                raise ValueError(
                    f"these heads are for a model with {name} {ours}, this one has {theirs}: train "
                    "heads for it with `locret train`"
                )

    def save(self, folder: str | Path, **facts: Any) -> None:
        """Write `heads.safetensors` and `heads.json` (sizes, and `facts` such as how trained)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        with atomic_path(folder / WEIGHTS) as path:
            save_file(tensors, path)
        write_json(folder / CONFIG, {"config": asdict(self.config), **facts})

    @classmethod
    def load(cls, folder: str | Path) -> RetainingHeads:
        """Heads that `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: files that do not belong together.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder / name} does not exist: `locret train MODEL -o {folder}` makes heads"
                )
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        try:
            heads = cls(HeadsConfig(**stored["config"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG} is not a description of heads: {error}") from error
        return _filled(heads, load_file(folder / WEIGHTS), str(folder / WEIGHTS))

    @classmethod
    def from_official(
        cls, state: Mapping[str, Tensor], model: PreTrainedModel, activation: str = "silu"
    ) -> RetainingHeads:
        """Heads of a released state dict: `model.layers.<i>.self_attn.fc1|fc2.weight`.

        Args:
            state: as read from a released checkpoint; keys without fc1 or fc2 are passed over.
            model: whose heads they are.
            activation: σ of the release, SiLU for all so far.

        Raises:
            ValueError: no such keys, or the sizes of another model.
        """
        found = {}
        for key, value in state.items():
            parts = key.split(".")
            if len(parts) >= 4 and parts[-2] in ("fc1", "fc2") and parts[-1] == "weight":
                found[f"layers.{parts[-4]}.{parts[-2]}.weight"] = value
        if not found:
            raise ValueError(
                "expected keys like model.layers.0.self_attn.fc1.weight, got "
                + (", ".join(list(state)[:3]) or "none")
            )
        width = found.get("layers.0.fc1.weight", torch.empty(0, 0)).shape[0]
        config = HeadsConfig(**shape_of(model), hidden=width, activation=activation)
        return _filled(cls(config), found, "the released state dict")


def _filled(heads: RetainingHeads, state: Mapping[str, Tensor], source: str) -> RetainingHeads:
    wanted = {name: tuple(value.shape) for name, value in heads.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"{source}: {name} is {given.get(name, 'missing')}, expected "
                f"{wanted.get(name, 'no such tensor')}"
            )
    heads.load_state_dict({k: v.float() for k, v in state.items()})
    return heads.eval()
