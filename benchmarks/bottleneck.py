"""The model as one object: time to load a bundle, and `predict` against encoding alone, on one bundle and folder of images.

    python benchmarks/bottleneck.py examples/openmoji/run/model examples/openmoji/run/categories/val

`efficiency` is the rate of `predict` from files (decoding, encoding, SAE, probe) divided by that of the encoder on the same
images, already preprocessed and in memory. `from_features_s` is the time for the same predictions from features.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from dncbm import ConceptBottleneckModel
from dncbm.features.streaming import encode_pictures, encode_pixels, picture_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("images", type=Path, help="folder of images, at any depth")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=int, default=256, help="images to use")
    arguments = parser.parse_args()
    ConceptBottleneckModel.from_pretrained(arguments.bundle, device=arguments.device)  # imports, and warms the disk's cache
    started = time.perf_counter()
    model = ConceptBottleneckModel.from_pretrained(arguments.bundle, device=arguments.device)
    load_s = time.perf_counter() - started
    paths = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = paths[: arguments.limit]
    assert model.encoder is not None
    pixels = torch.stack([model.encoder.preprocess(picture_of(path)) for path in paths])
    features = torch.cat(list(encode_pictures(model.encoder, paths)))
    size = 256 if model.device.type == "cuda" else 32

    def seconds(work) -> float:
        begun = time.perf_counter()
        work()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    rounds = [
        (
            seconds(lambda: model.predict(paths)),
            seconds(lambda: [encode_pixels(model.encoder, part) for part in pixels.split(size)]),
            seconds(lambda: model.predict(features)),
        )
        for _ in range(3)
    ]
    predict, encode, from_features = (min(column) for column in zip(*rounds, strict=True))
    found = {
        "device": str(model.device), "images": len(paths), "load_s": round(load_s, 3),
        "predict_images_per_s": round(len(paths) / predict, 1), "encode_images_per_s": round(len(paths) / encode, 1),
        "efficiency": round(encode / predict, 2), "from_features_s": round(from_features, 4),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
