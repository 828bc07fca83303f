"""Check a description of an API against the OpenAPI standard; nothing is printed if it is right.

python check_openapi.py FILE
"""

import json
import sys
from pathlib import Path

from openapi_spec_validator import OpenAPIV31SpecValidator

description = json.loads(Path(sys.argv[1]).read_text())
for error in OpenAPIV31SpecValidator(description).iter_errors():
    print(f"{'/'.join(map(str, error.absolute_path))}: {error.message}")
