"""Each field of the data config refuses what it cannot mean."""

import pytest

from plait.data.config import DataConfig
from plait.data.tasks.mlm import MaskedLanguageTask
from plait.data.tasks.mqar import MQARTask


def test_config_default_is_valid_and_trains_4096_tokens():
    assert DataConfig().bpe_vocab_size == 4096
    assert DataConfig(vocab_size=300).bpe_vocab_size == 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 0}, r"data\.seq_len=0 must be a whole number from 1 to 16777216; use 512"),
        ({"batch_size": -1}, r"data\.batch_size=-1 must be a whole number from 1 to 1048576; use 16"),
        ({"val_fraction": 0.9}, r"data\.val_fraction=0\.9 must be a finite number of at least 0 and at most 0\.5; use"),
        ({"val_fraction": float("nan")}, r"data\.val_fraction=nan must"),
        ({"seed": -1}, r"data\.seed=-1 must be a whole number from 0 to 4294967295; use 0"),
        ({"source": " "}, r"data\.source=' ' must be text that is not blank"),
        ({"text_field": ""}, r"data\.text_field='' must be text that is not blank"),
        ({"prompt_field": "text"}, r"data\.prompt_field='text' must be another field than text_field"),
        (
            {"prompt_field": "prompt", "task": MaskedLanguageTask()},
            r"data\.prompt_field='prompt' .* data\.task=mlm chooses those itself",
        ),
        ({"tokenizer": ""}, r"data\.tokenizer='' must be text that is not blank"),
        ({"cache_dir": ""}, r"data\.cache_dir='' must be text that is not blank.*; use None"),
        ({"task": MQARTask(num_kv_pairs=200)}, r"data\.task\.num_kv_pairs=200 must be at most a quarter of data\.seq_len=512"),
        ({"vocab_size": 256}, r"data\.vocab_size=256 must hold the 256 bytes.*use 257 or more"),
        ({"vocab_size": 4096, "tokenizer": "byte"}, r"data\.vocab_size=4096.*leave vocab_size out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_bad_field_says_path_value_rule_and_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
