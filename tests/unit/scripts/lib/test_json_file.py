import json
import math

import pytest

from lib.json_file import write_json


def test_the_folder_is_made_and_the_content_comes_back(tmp_path):
    path = tmp_path / "new" / "folder" / "record.json"
    write_json(path, {"latencies": [1.5, None]})
    assert json.loads(path.read_text()) == {"latencies": [1.5, None]}


def test_what_json_cannot_express_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "record.json", [math.nan])
    assert list(tmp_path.iterdir()) == []
