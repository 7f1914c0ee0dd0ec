"""What Ray says of a worker, in this project's words; and how much room a cluster has."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_score.engine.executors import ray as ray_crew
from dpo_score.engine.executors.pool import LostError
from dpo_score.engine.executors.ray import Device, RayBackend, RayWorkerHandle
from dpo_score.engine.executors.worker import Assignment
from dpo_score.errors import DpoScoreError

errors = pytest.importorskip("ray").exceptions
WORK = Assignment("reference", "", None, (0,))
DEATHS = {
    "memory monitor": errors.OutOfMemoryError("the node was running low on memory.\nTop 10 memory users:\n…"),
    "node": errors.NodeDiedError("the node died\n…"),
    "crash": errors.WorkerCrashedError(),
    "actor": errors.ActorDiedError(),
    "away": errors.ActorUnavailableError("the actor is restarting", None),
}
FAILURES = {
    "unschedulable": errors.ActorUnschedulableError("no node has a GPU"),
    "environment": errors.RuntimeEnvSetupError("pip\nfailed"),
    "raylet": errors.LocalRayletDiedError(),
}


class Actor:
    """Any method answers with one promise."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(options=lambda **_: self.__getattr__(name), remote=lambda *_: iter([name]))


class Ray:
    """A cluster whose every answer is `error`; `kills`: what became of the actors that were killed."""

    exceptions = errors

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.kills: list[bool] = []

    def get(self, _: object, timeout: float = 0.0) -> Any:
        raise self._error

    def kill(self, _: object, no_restart: bool) -> None:
        self.kills.append(no_restart)


def at_work(error: Exception) -> tuple[Ray, RayWorkerHandle]:
    ray = Ray(error)
    hand = RayWorkerHandle(ray, Actor())
    hand.work(WORK)
    return ray, hand


@pytest.mark.parametrize("how", DEATHS)
def test_a_worker_that_died_of_anything_is_lost_and_stands_again(how: str) -> None:
    ray, hand = at_work(DEATHS[how])
    with pytest.raises(LostError) as lost:
        hand.answer()
    assert "\n" not in str(lost.value)
    hand.restart()
    assert ray.kills == [], "what has begun again by itself is not killed"


def test_the_cause_of_a_death_is_told() -> None:
    with pytest.raises(LostError, match="low on memory"):
        at_work(DEATHS["memory monitor"])[1].answer()


@pytest.mark.parametrize("how", FAILURES)
def test_what_ray_cannot_do_is_one_paragraph(how: str) -> None:
    with pytest.raises(DpoScoreError, match="the same command resumes") as failed:
        at_work(FAILURES[how])[1].answer()
    assert type(FAILURES[how]).__name__ in str(failed.value)
    assert "\n" not in str(failed.value)


def test_the_end_waits_for_no_worker_whatever_it_died_of() -> None:
    ray, hand = at_work(DEATHS["memory monitor"])
    hand.kill()
    hand.wait_dead()
    assert ray.kills == [True]


@pytest.mark.parametrize(
    ("device", "room"),
    [
        (Device(1, 1), 5),
        (Device(2, 2), 2),
        (Device(8, 8), 1),
        (Device(3, 0), 4),
        (Device(1, 1, workers=7), 7),
    ],
)
def test_room_is_what_fits_unless_a_number_is_asked_for(device: Device, room: int) -> None:
    assert device.capacity({"GPU": 5.0, "CPU": 12.0}) == room
    assert Device(1, 1).capacity({"CPU": 4.0}) == 1, "a worker that waits asks an autoscaler for its node"


def test_devices_of_nodes_that_joined_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    there: Mapping[str, float] = {"CPU": 2.0}
    cluster = SimpleNamespace(remote=lambda **_: lambda kind: kind, cluster_resources=lambda: there)
    place = RayBackend(cluster, Device(1, 0))
    assert place.capacity == 2
    there = {"CPU": 6.0}
    assert place.capacity == 2, "counted a moment ago"
    monkeypatch.setattr(ray_crew, "COUNT_SECONDS", 0.0)
    assert place.capacity == 6
