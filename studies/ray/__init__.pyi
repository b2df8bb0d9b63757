from .door import tuner as tuner
from .policies import Within as Within
from .policies import bounds as bounds
from .policies import mutations as mutations
from .policies import policy_schedules as policy_schedules
from .searcher import StudySearcher as StudySearcher
from .trainable import as_trainable as as_trainable
