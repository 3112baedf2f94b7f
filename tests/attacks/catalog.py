"""All attacks, with their sizes."""

from __future__ import annotations

from tests.attacks import connections, load, memory, records, starvation
from tests.attacks.attack import Attack

MIB = 2**20
INFO = ("--log-level", "INFO")

HONEST_LOAD = Attack(load.honest_load, count=64)
"""What the latencies beside attacks are compared with."""
ATTACKS = (
    Attack(records.odd_start_times, count=8, short=4),
    Attack(records.odd_snapshots, count=2, short=1),
    Attack(records.odd_rows_of_the_store, count=10, short=5),
    Attack(records.slots_by_bad_imports, count=400, short=60, options=("--slots", "50")),
    Attack(records.forged_replies, count=40, short=20),
    Attack(memory.bindings_of_a_megabyte, count=1_800, short=600),
    Attack(memory.tables_of_unread_messages, count=1_024, short=300),
    Attack(memory.exports_not_read, count=1_000, short=150),
    Attack(memory.replies_not_read, count=30_000, short=3_000, grpcio_keeps=82 * MIB),
    Attack(memory.triton_ids_of_15_megabytes, count=200, short=40),
    Attack(memory.ended_triton_sequences, count=100, short=30),
    Attack(memory.missing_rows, count=1_000, short=200),
    Attack(memory.requests_of_16_megabytes, count=100, short=40, grpcio_keeps=16 * MIB),
    Attack(memory.gzip_bomb, count=64, short=16),
    Attack(starvation.streams_not_read, count=1_000, short=200, keeps=64 * MIB),
    Attack(starvation.lists_of_models, count=100, short=20),
    Attack(starvation.scrapers, count=64, short=64),
    Attack(starvation.scrapers_of_other_series, count=64, short=16),
    Attack(starvation.scrapes_left_half_open, count=1_000, short=200),
    Attack(
        starvation.refusals_while_nobody_reads_the_log,
        count=10_000,
        short=2_000,
        options=INFO,
        log_is_read=False,
    ),
    Attack(starvation.waiting_rows, count=10_000, short=10_000),
    Attack(starvation.waiting_packed_rows, count=24_000, short=12_000),
    Attack(connections.pings, count=200_000, short=60_000),
    Attack(connections.pings_unread, count=1_000, short=1_000),
    Attack(connections.answers_unasked, count=100, short=100),
    Attack(connections.resets, count=100_000, short=30_000),
    Attack(connections.connections_left_half_open, count=5_000, short=500),
    Attack(connections.streams_lost_at_once, count=100, short=40, keeps=32 * MIB),
)
