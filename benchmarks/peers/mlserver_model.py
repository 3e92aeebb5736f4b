"The model as MLServer's runtime for Python classes wants it."
from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceResponse
from model import answerer


class Served(MLModel):
    async def load(self) -> bool:
        self.ask = answerer()
        return True

    async def predict(self, payload):
        columns = {i.name: [v.decode() if isinstance(v, bytes) else v for v in i.data] for i in payload.inputs}
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("predictions", self.ask(rows))])


