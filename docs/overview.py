"""Draws the README's picture: normal | synthetic defect | mask | a real test image | its anomaly map.

python docs/overview.py brushed_metal fit-00003,fit-00012 dent/004.png,scratch/004.png
"""

import sys
from pathlib import Path

import numpy as np

from flawsmith.data.images import read_image, to_uint8, write_png
from flawsmith.data.triplets import TripletFolder
from flawsmith.inference.draw import draw_overlay
from flawsmith.inference.predictor import Predictor
from flawsmith.synthesis.sheet import contact_sheet


def main(category: str, triplets: str, images: str, out: str = "docs/overview.png") -> None:
    artifacts = Path("artifacts") / category
    folder, predictor = TripletFolder(artifacts / "synthesize"), Predictor(artifacts / "export" / "model.onnx")
    rows = []
    for triplet_id, name in zip(triplets.split(","), images.split(","), strict=True):
        normal, defect, mask = folder.read(triplet_id)
        test = read_image(Path("data") / category / "test" / name)
        prediction = predictor.predict([test])[0]
        heat_range = (predictor.metadata.map_low, predictor.metadata.map_high)
        overlay = draw_overlay(test, prediction.anomaly_map, heat_range, predictor.pixel_threshold)
        white = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
        rows.append(np.concatenate([to_uint8(normal), to_uint8(defect), white, to_uint8(test), overlay], axis=1))
    write_png(Path(out), contact_sheet(rows, columns=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
