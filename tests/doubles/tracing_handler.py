"""A TorchServe model whose handler leaves a file where it runs, to see whether it was run."""

import json
import zipfile
from pathlib import Path

HANDLER = """\
import pathlib

def handle(data, context):
    pathlib.Path({trace!r}).touch()
    return ["ran"] * len(data or [])
"""


def model_files(name, trace):
    """The files of the model by their names; `trace` is the file that running it leaves."""
    manifest = {
        "createdOn": "01/01/2026 00:00:00",
        "runtime": "python",
        "model": {"modelName": name, "handler": "tracing.py", "modelVersion": "1.0"},
        "archiverVersion": "0.12.0",
    }
    return {"MAR-INF/MANIFEST.json": json.dumps(manifest), "tracing.py": HANDLER.format(trace=str(trace))}


def write_archive(path, trace, **further):
    """Write the model as an archive, with further members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**model_files(path.stem, trace), **further}.items():
            archive.writestr(name, content)


def write_folder(folder, trace):
    """Write the model as an unpacked folder."""
    for name, content in model_files(Path(folder).name, trace).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


WORKFLOW = """\
models:
  min-workers: 1
  max-workers: 1
  batch-size: 1
  max-batch-delay: 100
  retry-attempts: 1
  timeout-ms: 3000
  stage:
    url: {model}
dag:
  start: [stage]
"""


def write_workflow(path, trace, model):
    """Write a workflow archive; it runs the archive `model` of the store, and a function of its own."""
    workflow = {"workflowName": path.stem, "specFile": "spec.yaml", "handler": "functions.py"}
    manifest = {"createdOn": "01/01/2026 00:00:00", "runtime": "python", "archiverVersion": "0.2"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("WAR-INF/MANIFEST.json", json.dumps({**manifest, "workflow": workflow}))
        archive.writestr("spec.yaml", WORKFLOW.format(model=model))
        archive.writestr("functions.py", HANDLER.format(trace=str(trace)).replace("handle", "start"))
