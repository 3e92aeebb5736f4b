"BentoML, with and without adaptive batching; `bentoml serve bento:Plain` or `bento:Batched`."
import bentoml
import pandas as pd
from model import fitted


@bentoml.service(workers=1, traffic={"timeout": 60})
class Plain:
    def __init__(self):
        self.model = fitted()

    @bentoml.api
    def predict(self, instances: list[dict]) -> list[str]:
        return self.model.predict(pd.DataFrame(instances)).tolist()


@bentoml.service(workers=1, traffic={"timeout": 60})
class Batched:
    def __init__(self):
        self.model = fitted()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=200)
    def predict(self, instances: list[dict]) -> list[str]:
        return self.model.predict(pd.DataFrame(instances)).tolist()
