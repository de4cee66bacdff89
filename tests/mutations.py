"""Mutations of the files of a model folder, as hypothesis strategies: what strangers and broken disks make of them."""

import copy
import json
import os
from pathlib import Path

from hypothesis import strategies as st

TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "mixtral", "t5", "whisper", "nonsense"]
# Keys that transformers, or this package, reads from some config.
KEYS = [
    "quantization_config", "auto_map", "attn_implementation", "torch_dtype", "dtype", "rope_scaling", "rope_theta",
    "layer_types", "sliding_window", "text_config", "vision_config", "spinquant_family", "architectures", "model_type",
    "tie_word_embeddings", "num_nextn_predict_layers", "mtp_num_hidden_layers", "id2label", "num_labels",
    "partial_rotary_factor", "attention_bias", "mlp_bias", "problem_type", "attribute_map", "sub_configs", "__class__",
    "use_dora", "use_rslora", "modules_to_save", "layers_pattern", "fan_in_fan_out", "bias", "target_modules",
]  # fmt: skip
NAMES = ["../x", "/x", "a/b", "a\\b", "a\0b", "", ".", "..", "\ud800", "x" * 300, "model.norm.weight", "config.json"]
NUMBERS = [0, 1, -1, 2, 3, 10**4, 10**9, 2**31, 2**63, 10**30, -(2**70), 0.0, -0.0, 1e-9, 1e300, 0.5]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32"]


def places(data, above=()):
    """The path of every value inside some JSON."""
    yield above
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inside:
        yield from places(value, (*above, key))


def value_at(data, place):
    for key in place:
        data = data[key]
    return data


def scalars():
    return st.one_of(
        st.sampled_from([None, True, False, "x", float("nan"), float("inf"), *NAMES, *NUMBERS, *TYPES, *DTYPES]),
        st.integers(-5, 5),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
    )


def values():
    return st.one_of(
        scalars(),
        st.lists(scalars(), max_size=3),
        st.dictionaries(st.sampled_from([*KEYS, "x"]), scalars(), max_size=3),
        st.sampled_from([40, 100, 5000]).map(nested),
    )


def nested(depth):
    """A list so deep; kept as text, which Python need not walk."""
    return "[" * depth + "]" * depth


@st.composite
def edited(draw, data):
    """Some JSON with one to three changes, as bytes."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(data))
        place = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(["replace", "near", "move", "delete", "add", "rename"]))
        data = changed(draw, data, found, place, kind)
    text = json.dumps(data)
    if draw(st.integers(0, 20)) == 0:
        deep = draw(st.sampled_from([60, 100, 5000]))
        text = text.replace("3", nested(deep), 1)
    return text.encode("utf-8", errors="surrogatepass")


def changed(draw, data, found, place, kind):
    value = value_at(data, place)
    if kind == "near" and isinstance(value, int | float):
        value = draw(st.sampled_from([value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)]))
    elif kind == "near" and isinstance(value, str):
        value = draw(st.sampled_from([value[:-1], value + "x", value.upper(), [value], value.replace("1", "0")]))
    elif kind == "near" and isinstance(value, list):
        value = draw(st.sampled_from([value[:-1], value + value[:1], value[::-1], dict(enumerate(map(str, value)))]))
    elif kind == "move":
        value = copy.deepcopy(value_at(data, draw(st.sampled_from(found))))
    elif kind == "add" and isinstance(value, dict):
        value[draw(st.sampled_from(KEYS) | st.text(max_size=5))] = draw(values())
        return data
    elif kind in ("delete", "rename") and place:
        parent, key = value_at(data, place[:-1]), place[-1]
        del parent[key]
        if kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from([f"{key}x", str(key)[:-1], *KEYS, *NAMES]))] = value
        return data
    else:
        value = draw(values())
    if not place:
        return value
    value_at(data, place[:-1])[place[-1]] = value
    return data


@st.composite
def damaged(draw, content):
    """Some bytes, damaged as by a transfer or a disk."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(0, min(len(content), draw(st.sampled_from([16, 4096, len(content)]))))))
        kind = draw(st.sampled_from(["cut", "flip", "insert", "drop", "repeat"]))
        size = draw(st.integers(1, 16))
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            flipped = bytes(one ^ draw(st.integers(1, 255)) for one in content[at : at + 1])
            content = content[:at] + flipped + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
        elif kind == "drop":
            content = content[:at] + content[at + size :]
        else:
            content = content[: at + size] + content[at:]
    return content


@st.composite
def safetensors(draw, content):
    """A safetensors file with another header, or damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    kind = draw(st.sampled_from(["edit", "dtype", "shape", "offsets", "swap"]))
    one, other = (header[draw(st.sampled_from(names))] for _ in range(2))
    if kind == "dtype":
        one["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        shape = one["shape"]
        other = [shape[::-1], [*shape, 1], [1, *shape], [0, *shape], [s // 2 for s in shape], shape[:-1], [-1, *shape]]
        one["shape"] = draw(st.sampled_from(other))
    elif kind == "offsets":
        one["data_offsets"] = draw(st.sampled_from([other["data_offsets"], [0, 0], [-8, 8], [0, 2**62], [8, 0]]))
    elif kind == "swap":
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    text = draw(edited(header)) if kind == "edit" else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def of_file(path: Path):
    """Mutated contents of a file, by its kind."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return safetensors(content)
    if path.suffix == ".json":
        return st.one_of(edited(json.loads(content)), edited(json.loads(content)), damaged(content))
    return damaged(content)


REPLACED = ["a link outside", "a link to nothing", "a link to itself", "a folder", "a pipe", "empty", "missing"]


def replace(path: Path, kind: str, outside: Path) -> None:
    """Put something else in the place of a file."""
    content = path.read_bytes()
    path.unlink()
    if kind == "a link outside":
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()


def write(data, path: Path, outside: Path) -> str:
    """Draw a mutation of a file, and put it in its place; a description of what was done."""
    kind = data.draw(st.sampled_from(["contents"] * 12 + REPLACED), label=f"what {path.name} becomes")
    if kind != "contents":
        replace(path, kind, outside)
        return kind
    path.write_bytes(data.draw(of_file(path), label=path.name))
    return kind
