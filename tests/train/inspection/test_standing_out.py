"""What stands out in a checkpoint is told in a line a kind, not as events of training."""

import dataclasses
from pathlib import Path

import numpy as np

from plait.train.report.run import Run
from plait.train.report.standing_out import standing_out
from plait.train.run_folder.probe_files import ProbeSeries
from plait.train.watching.watchers import Event


def test_events_of_a_kind_are_a_line_with_layers_and_the_furthest():
    events = [
        Event(0, "massive_activation", layer, None, 1000.0 + layer, 100.0, "already at the first probe") for layer in range(3, 28)
    ]
    events[8] = dataclasses.replace(events[8], value=24926.0)
    events += [Event(0, "logit_growth", 1, 2, 120.0, limit, "") for limit in (50.0, 100.0)]
    events += [Event(0, "low_entropy_at_start", 0, head, 0.01 * head, 0.1, "") for head in (1, 2)]
    series = ProbeSeries(np.zeros(0, int), {}, [], 4, [])
    run = Run(Path("x"), "whole", {}, {}, [], [event.to_dict() for event in events], series, None, [])
    told = standing_out([run, dataclasses.replace(run, name="without <b>", events=[])])
    for line in (
        "<td>whole</td><td>massive activation</td><td>layers 3-27</td><td>largest 24,926 in layer 11 (above 100)</td>",
        "<td>large attention logits</td><td>layer 1, 1 head</td><td>120 in layer 1 head 2 (above 100)</td>",
        "<td>low entropy</td><td>layer 0, 2 heads</td><td>smallest 0.01 in layer 0 head 1 (below 0.1)</td>",
    ):
        assert line in told, told
    assert told.count("<tr>") == 4 and "first probe" not in told and not standing_out([dataclasses.replace(run, events=[])])
