"""The routes under /v1."""

from fastapi import APIRouter

from server.api.openai import chat, completions, models
from server.api.openai.fine_tuning import files
from server.api.openai.fine_tuning import route as fine_tuning

router = APIRouter(prefix="/v1")
router.include_router(models.router)
router.include_router(chat.router)
router.include_router(completions.router)
router.include_router(files.router)
router.include_router(fine_tuning.router)
