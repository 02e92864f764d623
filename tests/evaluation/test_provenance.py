"""Records of an evaluation: their fields and the weights' checksum."""

import json

import pytest

from tarflow_hf import TarFlowLMModel
from tarflow_hf.evaluation import Evaluation, provenance_of, weights_checksum


def test_a_record_of_other_fields_is_rejected(flow):
    record = provenance_of(flow, "here", None) | {"mine": 1.0}
    with pytest.raises(ValueError, match=r"no Evaluation.*'mine', 'nats_per_token'"):
        Evaluation.from_json(json.dumps(record))
    assert record["command"].startswith("python ") and record["data_sha256"] is None


def test_the_checksum_is_of_the_weights(flow, tmp_path):
    flow.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = TarFlowLMModel.from_pretrained(tmp_path)
    assert weights_checksum(again) == weights_checksum(flow)
    again.flow.layers[1].start.data[0] += 1
    assert weights_checksum(again) != weights_checksum(flow)
