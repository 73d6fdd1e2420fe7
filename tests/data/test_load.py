import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import TypeAdapter, ValidationError
from test_gsm8k_rows import problem  # placeholder

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.load import load_data
