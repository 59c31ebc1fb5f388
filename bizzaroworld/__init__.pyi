from .battery.audit import audit as audit
from .battery.formats import load_battery as load_battery
from .battery.pairs import PromptPair as PromptPair
from .battery.tokens import align as align
from .battery.triage import triage as triage
from .circuits.edge_sets import edge_sets as edge_sets
from .circuits.interactions import interactions as interactions, shapley as shapley
from .circuits.knockout import knockout as knockout
from .circuits.paths import edges as edges, path_effects as path_effects
from .commands.circuits_run import run_attribution as run_attribution, run_circuit as run_circuit, run_paths as run_paths
from .commands.features_run import run_features as run_features
from .commands.lookup_run import run_lookup as run_lookup
from .commands.methods_run import run_methods as run_methods
from .dictionaries.learning import train_sae as train_sae
from .dictionaries.sae_files import load_sae as load_sae, save_sae as save_sae
from .dictionaries.saes import SAE as SAE
from .dictionaries.shipped import shipped as shipped
from .dictionaries.splicing import splice as splice
from .features.effects import feature_effects as feature_effects
from .features.steering import steer as steer
from .lookup.asking import ask as ask
from .methods.attention import attention_to as attention_to
from .methods.cross_model import cross_patch as cross_patch
from .methods.detections import detection_table as detection_table, detections as detections, warnings_of as warnings_of
from .methods.masks import Desideratum as Desideratum, train_mask as train_mask
from .methods.multiverse import multiverse as multiverse, variance_explained as variance_explained
from .model.load import load_model as load_model
from .paper.report import report as report
from .patch.forecast import forecast as forecast
from .patch.interventions import Edit as Edit, Intervention as Intervention, grid as grid
from .patch.means import mean_values as mean_values
from .patch.noise import Noise as Noise
from .patch.sweep import sweep as sweep
from .pipeline import run_study as run_study
from .replication.verdicts import claims as claims
from .results.compare import compare as compare
from .study.runs import open_run as open_run
from .tasks.ability import ability as ability, only_right as only_right
from .tasks.recipes import Task as Task
from .tasks.registry import make_task as make_task
from .words.embeddings import embedding_report as embedding_report
from .words.local import local_processing as local_processing

__version__: str
