"""The speed of this machine, measured once for all tests of doctor."""

from __future__ import annotations

import pytest
import torch

from coordexp.doctor import diagnosis
from coordexp.infra.device import DeviceRates, inference_plan, measured_rates


@pytest.fixture(scope="session")
def rates() -> DeviceRates:
    return measured_rates(inference_plan(torch.device("cpu")))


@pytest.fixture(autouse=True)
def _measured_once(rates: DeviceRates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "measured_rates", lambda _plan: rates)
