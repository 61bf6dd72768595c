"""Quantise a model, layer by layer: rounding, GPTQ or P-GPTQ, in the memory of one layer.

The calibration text goes through the layers once, and lies in a file between two of them. Every
matrix sees what the quantised matrices before it let through, so that later ones make up for
earlier ones. A layer is a file of the result when it is done: a killed run goes on after it.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpmcu import layout, model_files, sinks
from cpmcu._files import remove_abandoned, sha256, write_json
from cpmcu._torch import torch
from cpmcu.calibration import LayerRun, Windows
from cpmcu.codes import Codes, check, nearest
from cpmcu.first_token import FirstToken
from cpmcu.gptq import PREFIX, Hessian, gptq, objective
from cpmcu.loader import Progress, Source
from cpmcu.spec import ModelSpec
from cpmcu.tensors import Tensors, read_layer

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("rtn", "gptq", "p-gptq")
# The matrices of a layer in the order they are used, and the tensors that are stacked in them.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
log = logging.getLogger("cpmcu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to quantise.

    `samples` windows of `length` tokens are drawn from the calibration text with `seed`; `damp`,
    `act_order` and `search` as in `gptq.gptq` and `codes.nearest` (None: all but "rtn" in 4 bits);
    p-gptq holds `skip` first positions back: scaled down to the size of the others (`prefix`
    "level"), or left out of the Hessian ("drop", the paper's). With `sinks` the keys and values of
    first tokens are stored exactly (`sinks.py`). Embedding and head are rounded to 8 bits.
    """

    method: str = "p-gptq"
    bits: int = 4
    group: int = 32
    samples: int = 128
    length: int = 1024
    seed: int = 0
    damp: float = 0.01
    act_order: bool = False
    search: bool | None = None
    skip: int = PREFIX
    prefix: str = "level"
    sinks: bool = True

    def __post_init__(self) -> None:
        """ValueError names the option and its range."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check(self.group, self.bits, self.group)
        for name, low, high in (
            ("samples", 1, 10**6), ("length", 8, 10**6), ("skip", 0, self.length - 1)
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {getattr(self, name)}")
        if self.prefix not in ("level", "drop"):
            raise ValueError(f"prefix must be 'level' or 'drop', got {self.prefix!r}")
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp must be above 0 and at most 1, got {self.damp}")

    @property
    def searches(self) -> bool:
        """Whether scales are chosen by their squared error."""
        return self.calibrated or self.bits == 8 if self.search is None else self.search

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at calibration text."""
        return self.method != "rtn"


@dataclass(slots=True)
class Report:
    """What came out.

    `errors` has for every layer and matrix the relative error of its output on the calibration
    inputs, ||X (W - Q)ᵀ|| / ||X Wᵀ||, or of its weights for "rtn"; `bytes` of the files.
    """

    options: Options
    bytes: int = 0
    tokens: int = 0
    errors: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def quantise(
    model: str | Path,
    out: str | Path,
    *,
    calib: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Quantise `model` into the new folder `out`, or go on with a run that was killed.

    Args:
        model: folder or .gguf file.
        out: folder to write, in the layout of `layout.py`. The same command goes on where it
            stopped; a finished folder is not touched.
        calib: text for "gptq" and "p-gptq": plain text, or JSON lines with a field "text".
        progress: called with (matrices done, matrices in all).
        options: of `Options`.

    Raises:
        FileNotFoundError: no model, or no calibration text.
        FileExistsError: `out` holds something else.
        ValueError: an option is out of range, a width is no multiple of the group, the text is too
            short, or a Hessian cannot be inverted.
    """
    wanted, source, out = Options(**options), Source(model), Path(out)
    spec = source.spec
    for columns in {spec.hidden, spec.ffn, spec.heads * spec.head_dim}:
        check(columns, wanted.bits, wanted.group)
    windows = Windows.draw(source, calib, wanted) if wanted.calibrated else None
    done = _begin(out, source, calib, wanted)
    report = Report(wanted, tokens=0 if windows is None else windows.ids.numel())
    shards = [
        f"model-{i:05d}-of-{spec.layers + 1:05d}.safetensors" for i in range(1, spec.layers + 2)
    ]
    total = len(PARTS) * spec.layers + 1
    with Tensors(source) as tensors:
        _outer(tensors, out / shards[0], wanted)
        first = None if done else _first_tokens(source, tensors, out, wanted, windows)
        for i in range(spec.layers):
            shard = out / shards[i + 1]
            if done or shard.is_file():
                report.errors.append(_errors_in(shard))
                continue
            run = LayerRun(spec, i, windows, out / "work", tensors.read, first)

            def told(part: int, i: int = i) -> None:
                if progress is not None:
                    progress(1 + len(PARTS) * i + part, total)

            report.errors.append(_layer(tensors, i, run, wanted, shard, told))
    if not done:
        layout.write_index(out, shards)
        algorithm = {"name": wanted.method, **asdict(wanted), "calibration_tokens": report.tokens}
        config = layout.quantization_config(
            wanted.bits, wanted.group, algorithm, sinks=(out / sinks.FILE).is_file()
        )
        shutil.rmtree(out / "work", ignore_errors=True)
        model_files.write(source, out, quantization=config)  # config.json last: now it is a model
    files = [out / shard for shard in shards] + list(out.glob(sinks.FILE))
    report.bytes = sum(file.stat().st_size for file in files)
    if progress is not None:
        progress(total, total)
    return report


def _begin(out: Path, source: Source, calib: str | Path | None, options: Options) -> bool:
    """Make or check the folder; whether it is finished already."""
    manifest = {
        "options": asdict(options),
        "model": {file.name: sha256(file) for file in source.files},
        "calib": None if calib is None or not options.calibrated else sha256(calib),
    }
    path = out / "quantise.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != manifest:
            raise FileExistsError(
                f"{out} was begun with another model, text or options: take another folder, or "
                "remove it"
            )
        for file in out.glob("model-*.safetensors"):
            remove_abandoned(file)
        return (out / "config.json").is_file()
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is no quantisation that was begun: take another")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, manifest)
    return False


def _outer(tensors: Tensors, path: Path, options: Options) -> None:
    """Embedding, head and last norm."""
    if path.is_file():
        return
    found: dict[str, Tensor | Codes] = {"model.norm.weight": tensors.read("norm.weight")}
    names = ["embed_tokens.weight"] + ([] if tensors.spec.tie else ["lm_head.weight"])
    for name in names:
        stored = name if name.startswith("lm_head") else f"model.{name}"
        found[stored] = nearest(tensors.read(name), 8, options.group)
    layout.write_shard(path, found)


def _first_tokens(
    source: Source, tensors: Tensors, out: Path, options: Options, windows: Windows | None
) -> Tensor | None:
    """Write the sinks; what the layers should read of the windows' first tokens, exactly: float32
    [layers + 1, samples, hidden], NaN for tokens that are not stored. None: nothing is stored.
    """
    ids = sinks.first_tokens(source) if options.sinks else []
    if not ids:
        return None
    made, hidden = FirstToken(tensors).run(ids)
    made.save(out / sinks.FILE)
    if windows is None:
        return None
    places = [ids.index(token) if token in ids else -1 for token in windows.ids[:, 0].tolist()]
    none = hidden.new_full((len(hidden), 1, hidden.shape[2]), torch.nan)
    return torch.cat([hidden, none], 1)[:, places]


def _errors_in(shard: Path) -> dict[str, float]:
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("errors", "{}"))


def _layer(
    tensors: Tensors,
    index: int,
    run: LayerRun,
    options: Options,
    shard: Path,
    told: Callable[[int], None],
) -> dict[str, float]:
    """Quantise one layer and write its shard; the relative error of each matrix."""
    made, errors = {}, {}

    def stacked(*names: str) -> Tensor:
        return torch.cat([tensors.read(name).float() for name in names])

    layer = read_layer(tensors.spec, index, stacked, stacked)
    for number, part in enumerate(PARTS, start=1):
        weight = getattr(layer, part)
        if options.calibrated:
            skip = options.skip if options.method == "p-gptq" else 0
            hessian = Hessian(weight.shape[1], skip=skip, level=options.prefix == "level")
            run.inputs(layer, part, hessian.add)
            codes = gptq(
                weight, hessian.matrix, options.bits, options.group, damp=options.damp,
                act_order=options.act_order, search=options.searches,
            )  # fmt: skip
            measure = hessian.matrix
        else:
            codes = nearest(weight, options.bits, options.group, search=options.searches)
            measure = torch.eye(weight.shape[1], dtype=torch.float64)
        held = codes.dequantise()
        whole = objective(weight, torch.zeros_like(weight), measure)
        errors[part] = (objective(weight, held, measure) / whole) ** 0.5 if whole else 0.0
        setattr(layer, part, held)
        made |= _split(tensors.spec, index, part, codes)
        told(number)
    if options.calibrated:
        run.finish(layer)
    prefix = f"layers.{index}."
    plain = {
        f"model.{name}": tensors.read(name)
        for name in tensors.spec.tensors()
        if name.startswith(prefix) and f"model.{name}" not in made
    }
    layout.write_shard(shard, {**made, **plain}, {"errors": json.dumps(errors)})
    run.forget()
    log.info("layer %d: %s", index, {k: f"{v:.4f}" for k, v in errors.items()})
    return errors


def _split(spec: ModelSpec, index: int, part: str, codes: Codes) -> dict[str, Codes]:
    """The codes of stacked tensors by their own names."""
    names = [f"layers.{index}.{name}.weight" for name in PARTS[part]]
    shapes, first, found = spec.tensors(), 0, {}
    for name in names:
        rows = torch.arange(first, first + shapes[name][0])
        found[f"model.{name}"] = codes.rows(rows)
        first += len(rows)
    return found
