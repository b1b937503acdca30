"""Builds echo_ext._C with CMake. All metadata lives in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        out_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # A cached build directory remembers the ninja of an isolated environment that is gone by now.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DECHO_EXT_CUDA={os.environ.get('ECHO_EXT_CUDA', 'AUTO')}",
        ]
        if archs := os.environ.get("ECHO_EXT_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        configure += os.environ.get("CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", "")
        subprocess.run(["cmake", "--build", str(build_dir), "--parallel", *([jobs] if jobs else [])], check=True)


setup(ext_modules=[Extension("echo_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
