"""From checked parameters to channel B's policies; apart from builders.py, so that stage 1 needs no rollout code."""

from __future__ import annotations

from dataclasses import replace

from coordexp.config.schema import Params
from coordexp.rollout.stages import match_settings
from coordexp.training.channel_b import ChannelBSettings
from coordexp.training.rollout_pool import MatchSchedule
from coordexp.training.schedule import ramp


def channel_b_settings(params: Params) -> ChannelBSettings:
    """Policies of channel B."""
    stage2 = params.stage2
    return ChannelBSettings(
        passes=stage2.passes,
        missed=stage2.missed,
        eos_weight=stage2.eos_weight,
        close_weight=stage2.close_weight,
        extras=stage2.extras,
        over_generation=stage2.over_generation,
        over_close_weight=stage2.over_close_weight,
        mark_duplicates=stage2.duplicate_unlikelihood_weight > 0,
    )


def match_schedule(params: Params, steps: int) -> MatchSchedule:
    """Matching by step: those of `matching`, approached linearly over the curriculum's share of the steps."""
    final, stage2 = match_settings(params), params.stage2
    ramp_steps = round(stage2.curriculum_fraction * steps)
    gate = ramp(stage2.gate_from, final.gate_threshold, ramp_steps)
    lambda_sem = ramp(stage2.lambda_sem_from, final.lambda_sem, ramp_steps)
    return lambda step: replace(final, gate_threshold=gate(step), lambda_sem=lambda_sem(step))
