"BentoML, with and without adaptive batching; `bentoml serve bento:Plain` or `bento:Batched`."
import bentoml
from model import answerer


@bentoml.service(workers=1, traffic={"timeout": 60})
class Plain:
    def __init__(self):
        self.ask = answerer()

    @bentoml.api
    def predict(self, instances: list[dict]) -> list[str]:
        return self.ask(instances)


@bentoml.service(workers=1, traffic={"timeout": 60})
class Batched:
    def __init__(self):
        self.ask = answerer()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=200)
    def predict(self, instances: list[dict]) -> list[str]:
        return self.ask(instances)
