"""Derived figures, limits, ratios, the CSV, and the printed tables, all from made-up times."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from kernel_results import (
    ACTIVATION,
    BASELINE,
    COPY_BYTES_PER_SECOND,
    GROUP_SCALED_TOPS,
    MARLIN,
    OURS,
    Cell,
    activation_table,
    limit_us,
    read_floor_us,
    shape_table,
    stored_cells,
    stored_rows,
    with_ratios,
    write_cells,
)
from kernel_targets import SHAPES


def test_stored_times_cover_the_shapes() -> None:
    cells = stored_cells(SHAPES, [1, 16])
    assert {(c.N, c.K, c.M) for c in cells} == {(n, k, m) for n, k in SHAPES for m in (1, 16)}
    assert all(c.peer == MARLIN and c.note == "stored" for c in cells)
    assert stored_cells([(57344, 8192)], [1])[0].us == pytest.approx(90.86, abs=0.01)
    assert not stored_cells([(57344, 8192)], [4])
    floor = [row for row in stored_rows() if row["what"] == "read_floor"]
    assert {(int(row["N"]), int(row["K"])) for row in floor} == set(SHAPES)


def test_read_floor_runs_through_the_measured_points_and_rises() -> None:
    assert read_floor_us(9.5e6) == pytest.approx(3.71)
    assert read_floor_us(267.4e6) == pytest.approx(58.7)
    sizes = [1e6, 9.5e6, 12e6, 14.3e6, 50e6, 200e6, 300e6, 939e6]
    floors = [read_floor_us(size) for size in sizes]
    assert floors == sorted(floors)
    assert 939e6 / read_floor_us(939e6) / 1e6 == pytest.approx(4.6, abs=0.2)  # TB/s, beyond the last point


def test_figures_of_a_cell() -> None:
    cell = Cell(OURS, "8", 4096, 1024, 16, us=10.0, weight_bytes=5_000_000)
    assert cell.gbps == pytest.approx(500.0)
    assert cell.tflops == pytest.approx(2 * 16 * 4096 * 1024 / 10e-6 / 1e12)
    assert cell.share_of_limit == pytest.approx(read_floor_us(5e6) / 10.0)
    nothing = Cell(OURS, "8", 4096, 1024, 16)
    assert nothing.gbps is nothing.tflops is nothing.share_of_limit is None


def test_the_limit_is_the_larger_of_memory_and_compute() -> None:
    few = Cell(OURS, "8", 28672, 4096, 1, us=1.0, weight_bytes=66_800_000)
    assert limit_us(few) == pytest.approx(16.3)
    many = Cell(OURS, "8", 28672, 4096, 4096, us=1.0, weight_bytes=66_800_000)
    assert limit_us(many) == pytest.approx(2e-6 * 4096 * 28672 * 4096 / GROUP_SCALED_TOPS)
    assert limit_us(Cell(BASELINE, "", 28672, 4096, 1, weight_bytes=66_800_000)) == pytest.approx(16.3)
    assert limit_us(Cell(BASELINE, "", 28672, 4096, 4096, weight_bytes=66_800_000)) is None
    copied = Cell(ACTIVATION, "", 0, 4096, 4096, us=20.0, weight_bytes=int(COPY_BYTES_PER_SECOND * 10e-6))
    assert copied.share_of_limit == pytest.approx(0.5)
    assert copied.tflops is None


def test_ratios_are_to_the_baseline_of_the_same_point() -> None:
    cells = [
        Cell(BASELINE, "", 8, 8, 1, us=10.0),
        Cell(OURS, "8", 8, 8, 1, us=4.0),
        Cell(OURS, "8", 8, 8, 2, us=4.0),
        Cell(OURS, "4", 8, 8, 1, note="broken"),
        Cell(ACTIVATION, "", 0, 8, 1, us=1.0),
    ]
    assert [cell.ratio for cell in with_ratios(cells)] == [1.0, 2.5, None, None, None]


def test_csv_has_every_figure_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cells.csv"
    cells = [
        Cell(BASELINE, "", 4096, 4096, 1, us=12.5, us_min=12.0, us_max=13.0, weight_bytes=33_554_432),
        Cell(OURS, "8:10,4:90", 4096, 4096, 1, note="RuntimeError: a, b"),
    ]
    write_cells(cells[:1], path, {"device": "H200"})
    write_cells(cells, path, {"device": "H200"})
    assert [p.name for p in path.parent.iterdir()] == ["cells.csv"]
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert len(rows) == 2
    assert rows[0]["peer"] == BASELINE
    assert float(rows[0]["us"]) == 12.5
    assert float(rows[0]["gbps"]) == pytest.approx(2684.35, abs=0.01)
    assert rows[1]["us"] == rows[1]["gbps"] == ""
    assert rows[1]["note"] == "RuntimeError: a, b"
    assert rows[1]["row_bits"] == "8:10,4:90"
    assert {row["device"] for row in rows} == {"H200"}


def test_shape_table_has_a_line_per_peer_and_reasons_below() -> None:
    cells = with_ratios(
        [
            Cell(BASELINE, "", 4096, 4096, 1, us=12.0, weight_bytes=33_554_432),
            Cell(BASELINE, "", 4096, 4096, 4096, us=1200.0, weight_bytes=33_554_432),
            Cell("fp8_row", "", 4096, 4096, 1, note="RuntimeError: no"),
            Cell("fp8_row", "", 4096, 4096, 4096, note="RuntimeError: no"),
            Cell(OURS, "8:10,4:90", 4096, 4096, 1, us=5.0, weight_bytes=9_500_000),
        ]
    )
    lines = shape_table(cells).splitlines()
    assert lines[0] == "N=4096 K=4096"
    found = {line[:29].strip(): line[29:].split() for line in lines[1:-1]}
    assert found["us  x bf16"] == ["M=1", "M=4096"]
    assert found["bf16"] == ["12.0", "1.00x", "1200", "1.00x"]
    assert found["fp8_row"] == ["failed", "failed"]
    assert found["torchmix 8:10,4:90"] == ["5.0", "2.40x", "-"]
    assert found["GB/s"] == ["1900", "-"]
    assert found["% of limit"] == ["74", "-"]
    assert lines[-1] == "  fp8_row, M=1,4096: RuntimeError: no"


def test_activation_table() -> None:
    moved = int(COPY_BYTES_PER_SECOND * 10e-6)
    cells = [
        Cell(ACTIVATION, "", 0, 4096, 1, us=1.5, weight_bytes=12_000),
        Cell(ACTIVATION, "", 0, 4096, 4096, us=20.0, weight_bytes=moved),
        Cell(ACTIVATION, "", 0, 8192, 1, note="no kernel"),
    ]
    lines = activation_table(cells).splitlines()
    assert lines[1].split() == ["K=4096", "1.50", "0%", "20.00", "50%"]
    assert lines[2].split() == ["K=8192", "-", "-"]
    assert lines[3].strip() == "quantize_activation, M=1: no kernel"
