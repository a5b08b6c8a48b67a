"""Render the furniture images that `benchmarks/furniture.py` uses.

    pip install vtk pillow
    apt-get update                                  # the only step that needs root
    python benchmarks/furniture_render.py           # about 10 minutes on one core

The 820 textured models are those of the Debian package `sweethome3d-furniture` (CC0 and CC-BY 3.0;
the names of the authors are written beside the images). A class is one object; its images are
renders from seeded viewpoints, with seeded lights and backgrounds. Renders of artists' models are
not photographs. The result is kept in `~/.cache/pml_distill/furniture-VERSION/`:

    images/OBJECT/VIEW.png      128 x 128 pixels
    objects.csv                 object, author, category, creator, licence
    skipped.csv                 models that could not be rendered, and why
    ATTRIBUTION.txt             licences and authors, as the package states them
    CHECKSUM                    SHA-256 of all images

Models are rendered in a sub-process, because some of them crash or stall the importer.
"""

import argparse
import csv
import hashlib
import os
import re
import selectors
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

VERSION = "1.8-1"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pml_distill" / f"furniture-{VERSION}"
VIEWS = 12
SIZE = 128
SECONDS_PER_MODEL = 90
LARGEST_MODEL = 40_000_000  # bytes of the OBJ file; larger ones take minutes


def catalogue(archive):
    """The models of one `.sh3f` file: a dictionary of properties each."""
    text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    models = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)\s*=\s*(.*?)\s*$", text, re.MULTILINE):
        models.setdefault(int(number), {})[key] = value
    license_line = re.search(r"^license\s*=\s*(.*)$", text, re.MULTILINE)
    return [
        {**model, "license": license_line.group(1).strip()} for _, model in sorted(models.items()) if "model" in model
    ]


def unpack(folder):
    """Download and unpack the package; return the list of models with the paths of their files."""
    subprocess.run(["apt-get", "download", f"sweethome3d-furniture={VERSION}"], cwd=folder, check=True)
    (package,) = folder.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, folder / "package"], check=True)
    rows, attribution = [], [(folder / "package/usr/share/doc/sweethome3d-furniture/copyright").read_text()]
    for path in sorted((folder / "package/usr/share/sweethome3d/furniture").glob("*.sh3f")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder / path.stem)
            attribution += [f"\n== {path.stem}\n", archive.read("LICENSE.TXT").decode("latin-1")]
            for model in catalogue(archive):
                stem = re.sub(r"[^a-z0-9]+", "-", Path(model["model"]).stem.lower()).strip("-")
                name = f"{path.stem.lower()}--{stem}"
                file = folder / path.stem / model["model"].lstrip("/")
                known = {"category": model.get("category", ""), "title": model["name"]}
                known |= {"creator": model.get("creator", ""), "license": model["license"], "file": str(file)}
                rows.append({"object": name, "author": path.stem} | known)
                attribution.append(f"{name}: {model['name']}, by {model.get('creator', 'unknown')}")
    return rows, "\n".join(attribution)


def viewpoint(name, view):
    """The random generator of one view: the same on each machine, independent of the other views."""
    digest = hashlib.sha256(f"{name} {view}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def load_scene(file):
    """A VTK window with the model in it, its materials made alike: as imported, some overflow or stay black."""
    import vtk

    renderer, window, importer = vtk.vtkRenderer(), vtk.vtkRenderWindow(), vtk.vtkOBJImporter()
    window.SetOffScreenRendering(1)
    window.SetMultiSamples(0)
    window.SetSize(2 * SIZE, 2 * SIZE)
    window.AddRenderer(renderer)
    importer.SetFileName(file)
    material_file = re.search(r"^mtllib\s+(.+?)\s*$", Path(file).read_text("latin-1"), re.MULTILINE)
    if material_file and (Path(file).parent / material_file.group(1)).is_file():
        importer.SetFileNameMTL(str(Path(file).parent / material_file.group(1)))
        importer.SetTexturePath(str(Path(file).parent))
    importer.SetRenderWindow(window)
    importer.Update()
    actors = renderer.GetActors()
    actors.InitTraversal()
    for _ in range(actors.GetNumberOfItems()):
        actor = actors.GetNextActor()
        material = actor.GetProperty()
        color = (1.0, 1.0, 1.0) if actor.GetTexture() else material.GetDiffuseColor()
        material.SetColor(*color)
        material.SetAmbient(0.35)
        material.SetDiffuse(0.65)
        material.SetSpecular(0.05)
        material.SetInterpolationToPhong()
    return renderer, window


def render(name, file, folder):
    """Render all views of one model to `folder/VIEW.png`; raise if they are empty or all alike."""
    import vtk
    from PIL import Image
    from vtk.util.numpy_support import vtk_to_numpy

    renderer, window = load_scene(file)
    bounds = np.array(renderer.ComputeVisiblePropBounds()).reshape(3, 2)
    if not np.isfinite(bounds).all() or (bounds[:, 1] < bounds[:, 0]).any():
        raise ValueError("the model is empty")
    center, radius = bounds.mean(1), np.linalg.norm(bounds[:, 1] - bounds[:, 0]) / 2
    images, shown = [], []
    for view in range(VIEWS):
        random = viewpoint(name, view)
        azimuth, elevation = random.uniform(0, 2 * np.pi), np.radians(random.uniform(5, 50))
        direction = np.array(
            [np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)]
        )
        camera = vtk.vtkCamera()
        camera.SetViewAngle(30)
        distance = radius / np.sin(np.radians(15)) * random.uniform(0.75, 1.15)
        target = center + radius * random.uniform(-0.12, 0.12, 3)
        camera.SetFocalPoint(*target)
        camera.SetPosition(*(target + distance * direction))
        camera.SetViewUp(0, 1, 0)
        camera.Roll(random.uniform(-8, 8))
        renderer.SetActiveCamera(camera)
        renderer.ResetCameraClippingRange()
        renderer.RemoveAllLights()
        for strength in (random.uniform(0.7, 1.1), random.uniform(0.0, 0.5)):
            light = vtk.vtkLight()
            light.SetPosition(*(center + 4 * radius * (direction + random.uniform(-0.9, 0.9, 3))))
            light.SetFocalPoint(*center)
            light.SetIntensity(strength)
            light.SetColor(*random.uniform(0.8, 1.0, 3))
            renderer.AddLight(light)
        grey, tint = random.uniform(0.1, 1.0, 2), random.uniform(-0.15, 0.15, (2, 3))
        renderer.SetGradientBackground(True)
        renderer.SetBackground(*np.clip(grey[0] + tint[0], 0, 1))
        renderer.SetBackground2(*np.clip(grey[1] + tint[1], 0, 1))
        window.Render()
        grabber = vtk.vtkWindowToImageFilter()
        grabber.SetInput(window)
        grabber.ReadFrontBufferOff()
        grabber.Update()
        output = grabber.GetOutput()
        pixels = vtk_to_numpy(output.GetPointData().GetScalars()).reshape(2 * SIZE, 2 * SIZE, -1)[::-1, :, :3]
        images.append(Image.fromarray(np.ascontiguousarray(pixels)).resize((SIZE, SIZE), Image.Resampling.BOX))
        depth = vtk.vtkFloatArray()
        window.GetZbufferData(0, 0, 2 * SIZE - 1, 2 * SIZE - 1, depth)
        shown.append((vtk_to_numpy(depth) < 1).mean())
    window.Finalize()
    if np.median(shown) < 0.01:
        raise ValueError("the object fills less than 1 % of most views, or is transparent")
    folder.mkdir(parents=True, exist_ok=True)
    for view, image in enumerate(images):
        image.save(folder / f"{view:02d}.png")


def work():
    """Sub-process: read `object<TAB>file<TAB>folder` lines, answer each with `ok` or the reason why not."""
    for line in sys.stdin:
        name, file, folder = line.rstrip("\n").split("\t")
        try:
            render(name, file, Path(folder))
            answer = "ok"
        except Exception as error:  # one broken model must not end the others
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"\nanswer\t{answer}", flush=True)


class Worker:
    """A rendering sub-process that is started again after a crash or a stall."""

    def __init__(self):
        self.process = None

    def ask(self, line):
        if self.process is None or self.process.poll() is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([sys.executable, __file__, "--work"], bufsize=0, **pipes)
        self.process.stdin.write(f"{line}\n".encode())
        selector = selectors.DefaultSelector()
        selector.register(self.process.stdout, selectors.EVENT_READ)
        while selector.select(SECONDS_PER_MODEL):
            answer = self.process.stdout.readline().decode()  # unbuffered, so that select() sees what is left
            if answer == "":
                return f"the importer crashed ({self.process.wait()})"
            if answer.startswith("answer\t"):
                return answer.rstrip("\n").split("\t", 1)[1]
        self.process.kill()
        self.process.wait()
        return f"took longer than {SECONDS_PER_MODEL} s"


def checksum(images):
    digest = hashlib.sha256()
    for path in sorted(images.rglob("*.png")):
        digest.update(str(path.relative_to(images)).encode() + path.read_bytes())
    return digest.hexdigest()


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["object", "reason"])
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--limit", type=int, help="render only this many models, spread over all of them")
    folder, limit = (arguments := parser.parse_args()).folder, arguments.limit
    if (folder / "CHECKSUM").exists():
        return print(f"{folder} is complete")
    worker, done, skipped = Worker(), [], []
    with tempfile.TemporaryDirectory() as temporary:
        rows, attribution = unpack(Path(temporary))
        for number, row in enumerate(rows[:: max(1, len(rows) // limit)] if limit else rows):
            target, file = folder / "images" / row["object"], row.pop("file")
            large = os.path.getsize(file) > LARGEST_MODEL
            reason = "ok"
            if not (target / f"{VIEWS - 1:02d}.png").exists():
                reason = "the file is too large" if large else worker.ask(f"{row['object']}\t{file}\t{target}")
            if reason == "ok":
                done.append(row)
            else:
                skipped.append({"object": row["object"], "reason": reason})
            print(f"{number + 1}/{len(rows)} {row['object']} {reason}", flush=True)
    write_csv(folder / "objects.csv", done)
    write_csv(folder / "skipped.csv", skipped)
    (folder / "ATTRIBUTION.txt").write_text(attribution)
    (folder / "CHECKSUM").write_text(checksum(folder / "images") + "\n")
    print(f"{len(done)} objects with {VIEWS} views in {folder}; {len(skipped)} skipped")


if __name__ == "__main__":
    work() if "--work" in sys.argv else main()
