"""Measuring models: perplexity, the distance to a reference, and task accuracies."""

from quantkit.evaluation.perplexity import TextResult, evaluate_windows
from quantkit.evaluation.report import EvalReport, evaluate
from quantkit.evaluation.tasks import evaluate_tasks

__all__ = ["EvalReport", "TextResult", "evaluate", "evaluate_tasks", "evaluate_windows"]
