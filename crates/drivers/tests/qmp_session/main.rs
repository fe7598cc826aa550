//! Sessions at a VM without libvirt: real QEMUs, their guests' writes, and what
//! becomes of both when anything is cut off.

#[path = "../reading/mod.rs"]
mod reading;
mod rig;
mod shapes;
