"The model as MLServer's runtime for Python classes wants it."
import pandas as pd
from mlserver import MLModel
from mlserver.codecs import StringCodec
from mlserver.types import InferenceResponse
from model import fitted


class Served(MLModel):
    async def load(self) -> bool:
        self.model = fitted()
        return True

    async def predict(self, payload):
        frame = pd.DataFrame({i.name: [v.decode() if isinstance(v, bytes) else v for v in i.data] for i in payload.inputs})
        return InferenceResponse(model_name=self.name, outputs=[StringCodec.encode_output("predictions", self.model.predict(frame).tolist())])


