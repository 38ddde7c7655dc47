"""Probe files: padded, stacked, and named where they cannot be read."""

import numpy as np

from plait.train.run_folder.probe_files import read_probes, write_layers, write_probes


def test_probes_round_trip_pads_and_fills_what_is_missing(tmp_path):
    write_layers(tmp_path, [{"index": 0, "mixer": "softmax", "kind": "full", "num_heads": 2}], first_k=4)
    write_probes(tmp_path, 200, {"entropy": np.ones((1, 3)), "head_load": np.ones((1, 3))})
    write_probes(tmp_path, 50, {"entropy": np.zeros((1, 2))})
    probes = read_probes(tmp_path)
    assert probes.steps.tolist() == [50, 200] and probes.first_k == 4 and probes.layers[0]["mixer"] == "softmax"
    assert probes.arrays["entropy"].shape == (2, 1, 3) and probes.arrays["entropy"].dtype == np.float32
    assert np.isnan(probes.arrays["entropy"][0, 0, 2]) and np.isnan(probes.arrays["head_load"][0]).all()


def test_probe_file_that_cannot_be_read_is_named(tmp_path):
    write_probes(tmp_path, 1, {"entropy": np.zeros((1, 2))})
    (tmp_path / "probes/step_00000002.npz").write_bytes(b"PK\x03\x04 nothing")
    probes = read_probes(tmp_path)
    assert probes.steps.tolist() == [1] and "step_00000002.npz cannot be read" in probes.notes[0]
