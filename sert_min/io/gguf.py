"""Reading a GGUF file, the form of llama.cpp's models: metadata, then the list of tensors, then their
numbers (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Of its many number types only the
three of our one file are known. Nothing is checked here: read only bytes whose SHA-256 is known.
"""

import numpy as np

SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12),
                   ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")))  # fmt: skip
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8  # types of tensors
Q4_1_BLOCK = np.dtype([("scale", "<f2"), ("least", "<f2"), ("pairs", "u1", 16)])  # 32 numbers
Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("numbers", "i1", 32)])


def read_gguf(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """(metadata, fp32 tensors by name) of the bytes of a GGUF file, version 3."""
    at = 8  # behind b"GGUF" and the version

    def number(kind: str = "<u8"):
        nonlocal at
        x = np.frombuffer(data, kind, 1, at)
        at += x.nbytes
        return x[0].item()

    def value(kind: int):
        nonlocal at
        if kind == STRING:
            n = number()
            at += n
            return data[at - n : at].decode()
        if kind == ARRAY:
            kind, n = number("<u4"), number()
            return [value(kind) for _ in range(n)]
        return number(SCALARS[kind])

    n_tensors, n_values = number(), number()
    metadata = {value(STRING): value(number("<u4")) for _ in range(n_values)}
    places = {}
    for _ in range(n_tensors):
        name, n_axes = value(STRING), number("<u4")
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
    block = np.frombuffer(data, {Q4_1: Q4_1_BLOCK, Q8_0: Q8_0_BLOCK}[kind], n // 32, at)
    scale = block["scale"].astype("f4")[:, None]
    if kind == Q8_0:
        return (scale * block["numbers"]).ravel()
    # The low halves of Q4_1's bytes are numbers 0 to 15, the high halves 16 to 31.
    q = np.concatenate([block["pairs"] & 15, block["pairs"] >> 4], 1).astype("f4")
    return (scale * q + block["least"].astype("f4")[:, None]).ravel()
