"""The database, the blobs and the folder that providers keep their state in.

Importing this package is light: SQLAlchemy and the database drivers are imported when a store is opened.
"""

from llama_stack.storage.blobs import Blobs
from llama_stack.storage.database import Database
from llama_stack.storage.folder import Folder
from llama_stack.storage.migrations import Migration
from llama_stack.storage.store import Store, open_store

__all__ = ["Blobs", "Database", "Folder", "Migration", "Store", "open_store"]
