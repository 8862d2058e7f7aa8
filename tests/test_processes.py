"""Two processes on this machine: one program, the same weights, the same findings."""

import pytest
import together
from together import look, plain_model, run_together

import keras_glorot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def alone():
    """The same in this process, on whichever backend."""
    model = plain_model()
    keras_glorot.initialize(model, seed=1)
    return look(model)


@pytest.fixture(scope="module")
def on_jax():
    return run_together("jax", "on_jax")


def check_errors(results):
    for result in results:
        for error in result["errors"]:
            assert error.startswith("Argument `seed` must be given")


def test_jax_draws_nothing_without_a_seed(on_jax):
    check_errors(on_jax)


def test_initialize_draws_its_share(on_jax, alone):
    for result in on_jax:
        assert result["spans"]
        assert result["initialized"] == alone["initialized"]
        # Half of all kernels, a quarter for each of two devices.
        assert sum(result["drawn"]) == (16 * 32 + 5 * 32 * 32 + 32 * 8) // 2
        assert len(result["drawn"]) == 7 * 2
        assert "must be the same in each process" in result["other values"]


def test_the_isometric_start_is_the_same(on_jax, alone):
    assert alone["pairs"].count("yes") == 6
    for result in on_jax:
        for name in ("pairs", "isometric", "audit of pairs"):
            assert result[name] == alone[name]


def test_audit_finds_the_same_in_each_process(on_jax, alone):
    codes = {code for code, _, _ in alone["faults"]}
    assert {"twin", "zero-slice", "repeated-slice", "not-finite"} <= codes
    for result in on_jax:
        for name in ("audit", "faults"):
            assert result[name] == alone[name]


def test_propagate_and_calibrate_see_the_same_in_each_process(on_jax, alone):
    for name in ("propagate", "calibrate"):
        first, second = (result[name] for result in on_jax)
        assert first == second
        for row, wanted in zip(first, alone[name], strict=True):
            numbers = {key: each for key, each in row.items() if isinstance(each, float)}
            assert numbers
            for key, number in numbers.items():
                assert number == pytest.approx(wanted[key], rel=1e-3, abs=1e-4), key
    assert on_jax[0]["calibrated"] == on_jax[1]["calibrated"]
    assert on_jax[0]["calibrated"] != on_jax[0]["initialized"]


def test_another_batch_in_each_process_is_an_error(on_jax):
    for result in on_jax:
        assert result["other x"].startswith("Argument `x` must be the same batch")


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_processes_with_copies(backend, alone):
    results = run_together(backend, f"on_{backend}")
    check_errors(results)
    for result in results:
        assert result["initialized"] == alone["initialized"]
    for name in {"seeded", "unseeded"} & set(results[0]):
        assert results[0][name] == results[1][name]
    if backend == "torch":
        first, second = results[0]["seeded"]
        assert first != second


def test_the_helper_names_a_process_that_fails():
    with pytest.raises(AssertionError, match="KeyError"):
        together.run_together("torch", "missing")
