"""Packaging: the metadata is settings.ini's. The top-level `data/` is shipped as `bizzaroworld/data/`, and the paper's
notebooks with their bibliography as `bizzaroworld/data/paper/`, for reports on other runs."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
reader = ConfigParser(delimiters=["="], interpolation=None)
reader.read(HERE / "settings.ini", encoding="utf-8")
cfg = reader["DEFAULT"]


def lines(key):
    """The non-empty lines of a settings.ini entry, as a list."""
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


def readme():
    """README.md with the relative images and links made absolute, because package indexes show it without the repository."""
    path = HERE / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else cfg["description"]
    raw = cfg["git_url"].replace("https://github.com", "https://raw.githubusercontent.com") + f"/{cfg['branch']}/nbs/"
    return text.replace("](nbs/images/", f"]({raw}images/").replace("](nbs/", f"]({cfg['git_url']}/blob/{cfg['branch']}/nbs/")


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={extra: lines(f"{extra}_requirements") for extra in ("gguf", "peft", "gemma", "ray", "slurm", "dev", "browser")},
    entry_points={"console_scripts": lines("console_scripts")},
    packages=[*find_namespace_packages(include=["bizzaroworld*"]), "bizzaroworld.data", "bizzaroworld.data.paper"],
    package_dir={"bizzaroworld.data": "data", "bizzaroworld.data.paper": "nbs"},
    package_data={
        "bizzaroworld": ["__init__.pyi", "py.typed"],
        "bizzaroworld.data": ["*.json", "facts/*", "models/*", "models/*/*", "benchmarks/*", "published/*", "drift/*", "explorer/*", "architectures/*",
                              "methods/*", "methods/*/*", "circuits/*", "circuits/*/*", "words/*", "words/*/*", "people/*", "lookup/*", "lookup/*/*", "dictionaries/*", "dictionaries/*/*/*", "features/*", "features/*/*", "runs/*/*", "runs/seeds/*/*"],
        "bizzaroworld.data.paper": ["study/*.ipynb", "references.bib"],
    },
    zip_safe=False,
)
