"""Detect in images with a running server, read the answers with supervision, and print them as JSON.

python read_supervision.py URL IMAGE...
"""

import json
import sys

import requests
import supervision as sv

url, *images = sys.argv[1:]
read = []
for image in images:
    with open(image, "rb") as file:
        response = requests.post(url, data=file, headers={"X-Detect-Format": "supervision"}, timeout=60)
    response.raise_for_status()
    detections = sv.Detections.from_inference(response)
    assert len(detections[detections.confidence > 2]) == 0  # columns can be selected by
    read.append(
        {
            "boxes": detections.xyxy.tolist(),
            "scores": detections.confidence.tolist(),
            "class_ids": detections.class_id.tolist(),
            "labels": detections["class_name"].tolist(),
        }
    )
json.dump({"version": sv.__version__, "read": read}, sys.stdout)
