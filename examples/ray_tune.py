"""A sweep of Ray Tune: the sampler chooses lr, hypergradients move the rest, ASHA stops trials."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before ray starts: its ports are open

import ray
from ray.tune.schedulers import ASHAScheduler

from adapters import registry
from bilevel import Descent
from hypergrad import Unrolled
from studies.ray import StudySearcher, as_trainable, tuner

space = registry.get("network").space.own(lr="sampler", momentum="grad").fix(width=16, depth=1)
trainable = as_trainable(
    "network", "digits", space, Descent(Unrolled(steps=5)), budget=200, steps_per_report=8
)
searcher = StudySearcher(space, "loss", "min", storage="ray-tune.db", study_name="digits")
ray.init(num_cpus=2, include_dashboard=False)  # on a cluster: ray.init("auto")
results = tuner(
    trainable, searcher, trials=6, workers=2, out="ray-tune", scheduler=ASHAScheduler(max_t=5)
).fit()
print(results.get_best_result("loss", "min").metrics["loss"], searcher.study.best_params)
ray.shutdown()
