"""MLflow runs a copy of this file to get a registered model (`models from code`); nothing imports it."""

from mlflow.models import set_model

from flawsmith.registry.serving import SurfaceModel

set_model(SurfaceModel())
