"""Reading a GGUF file, the form of llama.cpp's models: metadata, then the list of tensors, then their
numbers (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Of its many number types only the
three of our one file are known. Nothing is checked here: read only bytes whose SHA-256 is known.
"""

import numpy as np

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
                   ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")))  # fmt: skip
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8  # types of tensors; the two quantised ones have blocks of 32 numbers
Q4_1_BLOCK = np.dtype([("scale", "<f2"), ("least", "<f2"), ("pairs", "u1", 16)])
Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("numbers", "i1", 32)])


def read_gguf(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, fp32 tensors by name) of the bytes of a GGUF file, version 3."""
    at = 0

    def number(kind: str = "<u8"):
        nonlocal at
        x = np.frombuffer(data, kind, 1, at)
        at += x.nbytes
        return x[0].item()

    def text() -> str:
        nonlocal at
        n = number()
        at += n
        return data[at - n : at].decode()

    def value(kind: int):
        if kind == STRING:
            return text()
        if kind == ARRAY:
            kind, n = number("<u4"), number()
            return [value(kind) for _ in range(n)]
        return number(SCALARS[kind])

    magic, version, n_tensors, n_values = number("S4"), number("<u4"), number(), number()
    if (magic, version) != (b"GGUF", 3):
        raise ValueError("this is no GGUF file of version 3")
    metadata = {}
    for _ in range(n_values):
        key = text()
        metadata[key] = value(number("<u4"))
    places = {}
    for _ in range(n_tensors):
        name, n_axes = text(), number("<u4")
        shape = [number() for _ in range(n_axes)][::-1]  # the file has the fastest axis first
        places[name] = shape, number("<u4"), number()
    align = metadata.get("general.alignment", 32)
    start = -(-at // align) * align
    return metadata, {
        name: numbers(data, start + offset, kind, int(np.prod(shape))).reshape(shape)
        for name, (shape, kind, offset) in places.items()
    }


def numbers(data: bytes, at: int, kind: int, n: int) -> np.ndarray:
    """n numbers of a tensor that begins at byte `at`, as fp32 [n]."""
    if kind == F32:
        return np.frombuffer(data, "<f4", n, at)
    if kind == Q8_0:
        b = np.frombuffer(data, Q8_0_BLOCK, n // 32, at)
        return (b["scale"].astype("f4")[:, None] * b["numbers"]).ravel()
    if kind == Q4_1:  # the low halves of the bytes are numbers 0 to 15, the high halves 16 to 31
        b = np.frombuffer(data, Q4_1_BLOCK, n // 32, at)
        q = np.concatenate([b["pairs"] & 15, b["pairs"] >> 4], 1).astype("f4")
        return (b["scale"].astype("f4")[:, None] * q + b["least"].astype("f4")[:, None]).ravel()
    raise ValueError(f"tensors of type {kind} are not known here")
