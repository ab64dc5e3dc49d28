"""One YAML file that says everything about a run, the folder that the run leaves behind, and what commands do.

config.py      the recipe: types, YAML, overrides       pipeline.py    from the model to the compared checkpoint
folder.py      what a run leaves on disk                evaluation.py  texts cut into windows, models compared on them
plan.py        what a recipe would do                   quantize.py    calibration only, no training
memory.py      bytes of a training, by arithmetic       probe.py       a few steps, timed
allocation.py  bits chosen layer by layer               training.py    what a training says while it runs
record.py      where a run is, kept in its folder       machine.py     how fast this machine trains
text.py        text that a model writes                 chat.py        a conversation with a model
teacher.py     what a teacher predicts, kept on disk    start.py       a model that is packed already
schema.py      the keys of a recipe, explained          preflight.py   what is known to be wrong before a run begins
disk.py        bytes that a run writes, by arithmetic   findings.py    what checks find, told together
block_probe.py the calibration of one block, timed
"""

from llmqat.recipe.chat import Conversation
from llmqat.recipe.config import EvaluationSettings, Recipe, scheme_of, training_arguments
from llmqat.recipe.evaluation import compare_models
from llmqat.recipe.folder import open_run_folder
from llmqat.recipe.pipeline import ResultsNotWrittenError, RunResult, run
from llmqat.recipe.plan import Inspection, Plan, available_bytes, coverage_of, devices_of, inspect_model, plan_run
from llmqat.recipe.probe import Probe, probe
from llmqat.recipe.quantize import quantize_model, sensitivity_of
from llmqat.recipe.reading import load_recipe
from llmqat.recipe.teacher import cache_teacher_of
from llmqat.recipe.text import synthesize_to

__all__ = [
    "Conversation",
    "EvaluationSettings",
    "Inspection",
    "Plan",
    "Probe",
    "Recipe",
    "ResultsNotWrittenError",
    "RunResult",
    "available_bytes",
    "cache_teacher_of",
    "compare_models",
    "coverage_of",
    "devices_of",
    "inspect_model",
    "load_recipe",
    "open_run_folder",
    "plan_run",
    "probe",
    "quantize_model",
    "run",
    "scheme_of",
    "sensitivity_of",
    "synthesize_to",
    "training_arguments",
]
