"""What `--workers` asks for, without any worker."""
import builtins
from types import SimpleNamespace

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from bizzaroworld import options
from bizzaroworld.scale import ray as on_ray
from bizzaroworld.scale.processes import Processes, Source
from bizzaroworld.scale.ray import RayCrew, crew_of
from bizzaroworld.scale.units import Alone
from bizzaroworld.scale.workers import Asked, CrewError, asked, cores

MODEL = SimpleNamespace(weights_sha256="of this model")
SOURCE = Source("some-model")


@pytest.mark.parametrize("text, want", [
    (None, Asked(1)), (1, Asked(1)), ("1", Asked(1)), (4, Asked(4)), (" 4 ", Asked(4)), ("ray", Asked(None, True)), ("ray:4", Asked(4, True)), ("ray:1", Asked(1, True)),
    ("ray:auto", Asked(None, True, "auto")), ("ray:head-0.cluster:6379", Asked(None, True, "head-0.cluster:6379")), ("ray:[::1]:6379", Asked(None, True, "[::1]:6379")),
    ("share:1/1", Asked(share=(1, 1))), ("share:3/16", Asked(share=(3, 16)))])
def test_one_text_says_who_works(text, want): assert asked(text) == want


@pytest.mark.parametrize("text, why", [("0", "^0 workers: ask for one or more"), (-2, "^-2 workers"), ("ray:0", "^0 workers"), *((text, "^Unknown workers .*use a number, ray, ray:N") for text in (
    "", "two", "2.5", "Ray", "rays", "ray:", "ray:head", "ray:head:", "ray::6379", "ray:head:0", "ray:head:65536", "ray:head:6379:1", "ray:a b:6379", "auto", "head:6379", "٤", True, "share:", "share:0/4", "share:5/4", "share:1", "share:1/", "share:-1/4", "share:1/2/3", "1/2"))])
def test_other_texts_are_refused_in_words(text, why):
    with pytest.raises(CrewError, match=why): asked(text)


@given(st.text(max_size=30) | st.text(max_size=30).map("ray:".__add__) | st.text("0123456789/ ", max_size=9).map("share:".__add__))
def test_no_text_does_anything_else(text):
    try: found = asked(text)
    except CrewError as error: assert len(str(error)) < 400
    else: assert (found.ray and text.strip().startswith("ray")) or (found.share and text.strip().startswith("share") and found.share[0] <= found.share[1]) or found == Asked(int(text))


def test_how_many_hold_the_model_here():
    assert [asked(text).here for text in (None, 3, "ray:5", "ray:auto", "ray:head:6379")] == [1, 3, 5, 1, 1]
    assert asked("ray").here == max(1, cores() // 2)


def test_the_option_says_the_same():
    assert [options._workers(text) for text in (None, "4", "ray:auto")] == [None, "4", "ray:auto"]
    with pytest.raises(typer.BadParameter, match="Unknown workers 'many'"): options._workers("many")


def test_each_text_becomes_its_crew():
    assert isinstance(crew_of("1", None, MODEL).enter_result, Alone) and Alone(MODEL).n == 1
    two, ray, there = (crew_of(text, SOURCE, MODEL) for text in ("2", "ray:3", "ray:head:6379"))
    assert isinstance(two, Processes) and two.n == 2 and isinstance(ray, RayCrew) and (ray.n, ray.address) == (3, None) and (there.n, there.address) == (None, "head:6379")
    assert two.source.weights_sha256 == ray.source.weights_sha256 == MODEL.weights_sha256
    with pytest.raises(CrewError, match="Unknown workers 'many'"): crew_of("many", SOURCE, MODEL)
    with pytest.raises(CrewError, match="give it by name"): crew_of("ray", None, MODEL)


def test_without_ray_the_extra_is_named(monkeypatch):
    usual = builtins.__import__
    def missing(name, *args, **kwargs):
        if name == "ray": raise ImportError(name)
        return usual(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(CrewError, match=r"pip install 'bizzaroworld\[ray\]'"), crew_of("ray", SOURCE, MODEL): pass


class Cluster:
    """What `RayCrew` asks of Ray about a cluster whose machines have so many CPUs and GPUs."""
    def __init__(self, *machines): self.machines = machines
    def cluster_resources(self): return {"CPU": sum(c for c, _ in self.machines)} | ({"GPU": gpus} if (gpus := sum(g for _, g in self.machines)) else {})
    def nodes(self): return [{"Alive": True, "Resources": {"CPU": c} if c else {}} for c, _ in self.machines]
    def remote(self, **options): return lambda cls: SimpleNamespace(remote=lambda source, threads, path: (options, source, threads))


@pytest.mark.parametrize("device, n, address, machines, workers, cpus, gpus, on", [
    (None, None, None, [(8, 0)], 4, 2, 0, None), (None, 2, None, [(8, 0)], 2, 4, 0, None), (None, None, None, [(16, 4)], 4, 4, 1, None),
    (None, 8, None, [(16, 4)], 8, 2, 1 / 2, None), (None, 5, None, [(16, 4)], 5, 3, 1 / 2, None), ("cpu", None, None, [(16, 4)], 8, 2, 0, "cpu"), ("cuda:1", 2, None, [(16, 4)], 2, 8, 1, "cuda"),
    (None, None, "auto", [(8, 0), (4, 0), (0, 0)], 6, 2, 0, None), (None, 2, "auto", [(8, 0), (4, 0), (0, 0)], 2, 4, 0, None), (None, None, "auto", [(8, 4), (8, 4)], 8, 1, 1, None),
    (None, 12, "auto", [(8, 4), (8, 4)], 12, 1, 1, None)])
def test_what_there_is_is_divided_among_the_workers(device, n, address, machines, workers, cpus, gpus, on):
    """Never more than the machines have, unless so many were asked for on a cluster that may grow."""
    crew = RayCrew(Source("m", device), n, address)
    crew._share(Cluster(*machines))
    options, source, threads = crew._new()
    assert (crew.n, options["num_cpus"], options["num_gpus"], source.device) == (workers, cpus, gpus, on) and threads >= 1
    if not address: assert workers * cpus <= sum(c for c, _ in machines) and (not gpus or workers <= int(1 / gpus) * sum(g for _, g in machines))


class ActorDiedError(Exception): pass
class OutOfMemoryError(Exception): pass


def test_how_a_worker_ended_is_one_sentence():
    died = ActorDiedError("The actor died unexpectedly before finishing this task.\n\tpid: 14524\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR " + "x" * 900)
    assert on_ray._how(died) == "The actor is dead because its worker process has died"
    assert on_ray._how(OutOfMemoryError("Task was killed.\n")) == "Task was killed (for want of memory)" and on_ray._how(ActorDiedError()) == "ActorDiedError"
