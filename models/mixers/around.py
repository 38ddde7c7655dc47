"""A mixer around the heads of another: everything is the inner one's but what a subclass overrides."""

from __future__ import annotations

from plait.models.mixers.base import HeadMixer


class AroundHeads(HeadMixer):
    """Hands every piece of the contract on to `inner`; a subclass sets that and `num_heads`, and overrides what it changes."""

    inner: HeadMixer

    def project(self, x, *, at, state):
        return self.inner.project(x, at=at, state=state)

    def project_step(self, x, *, at, state):
        return self.inner.project_step(x, at=at, state=state)

    def share(self, inputs, carry):
        return self.inner.share(inputs, carry)

    def prepare(self, inputs, *, at):
        return self.inner.prepare(inputs, at=at)

    def recall(self, inputs, carry, *, at, state):
        return self.inner.recall(inputs, carry, at=at, state=state)

    def mix(self, inputs, x, *, at):
        return self.inner.mix(inputs, x, at=at)

    def attend(self, inputs, *, at, state):
        return self.inner.attend(inputs, at=at, state=state)

    def attend_active(self, inputs, active, *, at):
        return self.inner.attend_active(inputs, active, at=at)

    def attend_step(self, inputs, *, at, state):
        return self.inner.attend_step(inputs, at=at, state=state)

    def finish(self, o, inputs, x):
        return self.inner.finish(o, inputs, x)

    def output(self, o):
        return self.inner.output(o)

    def implied(self, inputs, rows, *, at):
        return self.inner.implied(inputs, rows, at=at)

    def observe(self, inputs, x, *, at):
        return self.inner.observe(inputs, x, at=at)

    def auxiliary_losses(self, inputs, x, *, at):
        return self.inner.auxiliary_losses(inputs, x, at=at)

    def counts(self, inputs, x, *, at):
        return self.inner.counts(inputs, x, at=at)

    def settle(self, counts):
        self.inner.settle(counts)

    def clip(self, ratio, alpha):
        self.inner.clip(ratio, alpha)

    def init_state(self, batch_size, max_len):
        return self.inner.init_state(batch_size, max_len)
