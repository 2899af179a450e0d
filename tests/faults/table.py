"""Every fault that is under test, what is seen of it, and the test that shows it.

`python -m tests.faults.table` prints docs/faults.md, which is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.faults.test_training import FAULTS

TRAINING = "tests/faults/test_training.py::test_a_fault_is_said_and_the_checkpoints_stay"
AREAS = {  # the first fault of each
    "a line that is no JSON": "Listings and captions",
    "an empty clip": "Clips and images",
    "fewer rows than a batch": "Batches and buckets",
    "NaN in the predictor's weights": "Values and weights",
    "an unknown field": "Recipes",
    "an adapter that matches nothing": "Adapters",
    "a checkpoint that is not there": "Checkpoints and output",
}


class Row(NamedTuple):
    """seen: what the user sees of a fault; test: FILE::FUNCTION."""

    area: str
    fault: str
    seen: str
    test: str


TASKS = "tests/plugins/tasks"
OTHERS = (
    Row(
        "Listings and captions",
        "a caption of more tokens than the text encoder takes",
        "a warning that shows it and the limit; it is cut. `cvx data inspect` counts them",
        f"{TASKS}/test_data_faults.py::test_captions_too_long_are_cut_with_a_warning_that_shows_them",
    ),
    Row(
        "Listings and captions",
        "a byte-order mark, other line ends",
        "no fault: the rows are the same",
        "tests/faults/test_training.py::test_a_byte_order_mark_and_other_line_ends_change_nothing",
    ),
    Row(
        "Listings and captions",
        "very many bad lines",
        "the first 20, each with its line, and the number of all",
        "tests/plugins/datasets/test_listing.py::test_only_twenty_problems_are_shown_and_all_counted",
    ),
    Row(
        "Clips and images",
        "bad clips of several kinds at once, `loader.unreadable: skip`",
        "each is left out; data.json, log and report list it with its reason, and the counts add up",
        "tests/faults/test_unreadable.py::test_clips_of_every_bad_kind_are_left_out_counted_and_reported",
    ),
    Row(
        "Clips and images",
        "bad clips on several ranks, `loader.unreadable: skip`",
        "all ranks leave out the same, and train on the rows that one process has",
        "tests/faults/test_unreadable_ranks.py::test_two_ranks_leave_out_the_same_clips_as_one_process",
    ),
    Row(
        "Clips and images",
        "bad clips of several kinds at once, buckets",
        "the same, for what a look at the file shows",
        f"{TASKS}/test_data_faults.py::test_with_buckets_bad_clips_are_skipped_counted_and_reported",
    ),
    Row(
        "Clips and images",
        "a clip that crashes or hangs the decoder",
        "`inspect` and `unreadable: skip` lose that file alone, and name it with exit code or time",
        "tests/io/test_inspection.py::test_a_crash_and_a_hang_cost_one_file_each",
    ),
    Row(
        "Clips and images",
        "a clip that kills a loader worker",
        "an error that says how to find it",
        "tests/faults/test_unreadable.py::test_a_worker_that_dies_names_the_remedy",
    ),
    Row(
        "Clips and images",
        "a clip that breaks between two runs",
        "an error that names it; once it is whole, the run goes on as if nothing had been",
        f"{TASKS}/test_data_faults.py::test_a_clip_that_breaks_later_costs_no_saved_step",
    ),
    Row(
        "Clips and images",
        "a variable frame rate",
        "frames are picked by their times; `inspect` notes it",
        "tests/plugins/readers/test_readers.py::"
        "test_frames_of_a_variable_rate_are_those_shown_at_each_instant",
    ),
    Row(
        "Clips and images",
        "a rotated clip",
        "turned as players show it",
        "tests/plugins/readers/test_readers.py::test_rotated_clips_are_turned_as_players_show_them",
    ),
    Row(
        "Clips and images",
        "a rotation that is no quarter turn",
        "an error: only quarter turns are read",
        "tests/plugins/readers/test_readers.py::test_rotation_by_other_than_quarter_turns_is_an_error",
    ),
    Row(
        "Clips and images",
        "a mirrored clip",
        "an error that says how to write it anew",
        "tests/plugins/readers/test_readers.py::test_a_mirrored_clip_is_an_error",
    ),
    Row(
        "Clips and images",
        "odd sizes, two files of the same bytes",
        "used; `inspect` names the first file of those bytes",
        "tests/io/test_inspection.py::test_each_clip_is_found_out",
    ),
    Row(
        "Batches and buckets",
        "more clips left out than `loader.max_drop`",
        "an error with the reasons, before the first step",
        "tests/faults/test_unreadable.py::test_more_than_the_limit_is_an_error_before_the_first_step",
    ),
    Row(
        "Values and weights",
        "a loss that is not finite",
        "an error that names step, first module, rows and timesteps",
        f"{TASKS}/test_guards.py::test_a_loss_names_the_module_it_begins_in_the_rows_and_their_timesteps",
    ),
    Row(
        "Values and weights",
        "a loss that is not finite, `non_finite: skip`",
        "the step changes nothing; it is counted, with its reason in log.jsonl",
        f"{TASKS}/test_guards.py::test_steps_that_are_left_out_change_nothing_and_are_counted",
    ),
    Row(
        "Values and weights",
        "a gradient that is not finite",
        "an error that names step and parameter",
        f"{TASKS}/test_guards.py::test_gradients_name_where_they_begin_on_the_way_back",
    ),
    Row(
        "Values and weights",
        "values that are not finite while sampling or decoding",
        "an error with the step; no video is written",
        "tests/faults/test_other_tasks.py::test_values_that_are_not_finite_become_no_video",
    ),
    Row(
        "Values and weights",
        "float16 for a bfloat16 release",
        "an error of the check that says what to use",
        "tests/core/test_precision.py::"
        "test_a_bfloat16_release_does_not_run_in_float16_unless_its_card_says_so",
    ),
    Row(
        "Feature caches",
        "a clip or caption that was edited since",
        "an error of training that names it; precompute makes exactly what it touches",
        f"{TASKS}/test_precompute.py::test_an_edit_encodes_exactly_what_it_touches_and_says_why",
    ),
    Row(
        "Feature caches",
        "other encoder weights",
        "an error: the cache is stale, autoencoder weights changed",
        f"{TASKS}/test_precompute.py::"
        "test_other_weights_encode_what_they_encode_and_the_same_elsewhere_nothing",
    ),
    Row(
        "Feature caches",
        "an item that is cut, is gone or holds NaN",
        "an error with the file, or the rows, and what to run",
        "tests/faults/test_other_tasks.py::test_a_damaged_item_ends_training_from_the_cache_with_what_to_run",
    ),
    Row(
        "Feature caches",
        "a latent that is not finite",
        "not written; its row is named",
        f"{TASKS}/test_precompute.py::test_latents_that_are_not_finite_are_refused",
    ),
    Row(
        "Feature caches",
        "rows that cannot be read",
        "all others are encoded; `unreadable: error` or `skip` decides about the list",
        f"{TASKS}/test_precompute.py::test_unreadable_rows_are_all_named_and_the_work_on_the_others_is_kept",
    ),
    Row(
        "Feature caches",
        "a disk that fills",
        "an error; all complete items are kept and not made again",
        "tests/faults/test_other_tasks.py::test_a_disk_that_fills_while_precomputing_keeps_the_items_before",
    ),
    Row(
        "Feature caches",
        "a process that is killed at work",
        "the others go on, and make its item",
        f"{TASKS}/test_precompute.py::"
        "test_two_processes_share_the_work_and_one_goes_on_when_the_other_is_killed",
    ),
    Row(
        "Adapters",
        "an adapter of another model",
        "an error with the weights that the model has not",
        "tests/plugins/lora/test_training.py::test_a_lora_of_another_model_is_refused",
    ),
    Row(
        "Adapters",
        "an adapter of another rank, alpha or other targets",
        "an error with both values",
        "tests/plugins/lora/test_training.py::test_a_file_that_is_not_the_adapter_is_refused",
    ),
    Row(
        "Adapters",
        "an adapter that changes nothing in the end",
        "an error; the checkpoint stays, nothing is exported",
        "tests/plugins/lora/test_training.py::"
        "test_a_lora_that_changes_nothing_is_an_error_and_the_checkpoint_stays",
    ),
    Row(
        "Checkpoints and output",
        "a newest checkpoint that is damaged",
        "a warning; the run goes on from the one before",
        "tests/faults/test_training.py::test_a_damaged_newest_checkpoint_is_set_aside_and_said",
    ),
    Row(
        "Checkpoints and output",
        "a disk that fills during a save, beside the steps or not",
        "an error; the saves before stay, and the run goes on from them",
        "tests/faults/test_training.py::"
        "test_a_disk_that_fills_during_a_save_keeps_the_saves_before_and_the_run_goes_on",
    ),
    Row(
        "Checkpoints and output",
        "a disk that fills during the export",
        "an error; checkpoints and an export before stay",
        "tests/faults/test_training.py::"
        "test_a_disk_that_fills_during_the_export_keeps_the_checkpoint_and_the_export_before",
    ),
    Row(
        "Checkpoints and output",
        "a disk that fills while sampling",
        "an error; complete videos stay and are not made again",
        "tests/faults/test_other_tasks.py::test_a_disk_that_fills_while_sampling_keeps_the_videos_before",
    ),
    Row(
        "Checkpoints and output",
        "an output that is a file or may not be written",
        "an error that says which",
        "tests/faults/test_training.py::test_an_output_that_cannot_be_written",
    ),
    Row(
        "Checkpoints and output",
        "sampling into the folder of a training run",
        "an error: it would replace that run's record",
        f"{TASKS}/test_record.py::test_tasks_without_checkpoints_leave_the_same_record_a_failed_one_too",
    ),
    Row(
        "Checkpoints and output",
        "two prompts of one name",
        "two videos, told apart by their number",
        "tests/faults/test_other_tasks.py::test_two_prompts_of_one_name_give_two_videos",
    ),
    Row(
        "Processes",
        "a kill at any moment",
        "the resumed run ends with the same weights, bit for bit",
        f"{TASKS}/test_killed.py::test_twenty_kills_at_random_moments_change_nothing",
    ),
    Row(
        "Processes",
        "a rank that dies",
        "it is named, all others end, a restart goes on",
        "tests/distributed/test_launch.py::"
        "test_a_killed_rank_is_named_all_stop_and_a_restart_ends_as_if_nothing_had_been",
    ),
    Row(
        "Processes",
        "a rank that is stopped, also the one that holds the store",
        "the others name it and end in time",
        "tests/distributed/test_stopped.py::test_the_other_rank_names_it_and_ends",
    ),
    Row(
        "Processes",
        "a launcher told to end while a rank is stopped",
        "the others end of their own accord",
        "tests/distributed/test_stopped.py::test_a_stopped_rank_keeps_no_run_going",
    ),
    Row(
        "Processes",
        "a store that takes connections but does not answer",
        "an error that says where it is, in time",
        "tests/core/test_joining.py::test_a_store_that_takes_connections_but_never_answers_is_an_error",
    ),
    Row(
        "Processes",
        "an interrupt",
        "the run saves and stops after the step",
        f"{TASKS}/test_train.py::test_an_interrupt_saves_and_stops_after_the_step",
    ),
)

HEAD = """# What happens when ...

Whatever is at fault, a run ends with an error that says what, where and what to do (exit code 2), or leaves
something out, counted and reported. What was complete before - checkpoints, cache items, videos, exports -
stays as it was. The lists below are made of the tests that show it (`python -m tests.faults.table`). Words in
quotes are part of the error, here of a listing `clips.jsonl` whose second row is the clip `b.mp4`.
"""


def rows() -> Iterator[Row]:
    """Yield every fault; those of a training run first."""
    area = ""
    for name, fault in FAULTS.items():
        area = AREAS.get(name, area)
        yield Row(area, name, " ... ".join(f'"{part.strip()}"' for part in fault.says), TRAINING)
    yield from OTHERS


def page() -> str:
    """Return docs/faults.md."""
    areas: dict[str, list[Row]] = {}
    for row in rows():
        areas.setdefault(row.area, []).append(row)
    parts = [HEAD]
    for area, members in areas.items():
        lines = [f"| {row.fault} | {row.seen.replace('|', chr(92) + '|')} |" for row in members]
        parts.append("\n".join([f"## {area}\n", "| fault | what is seen |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
