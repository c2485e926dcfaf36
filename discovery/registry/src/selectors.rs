//! Who selects whom, without looking at everybody.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

pub(crate) type Labels = BTreeMap<String, String>;
type Names = BTreeSet<Arc<str>>;

/// True if all pairs of the selector are there. An empty selector selects nothing.
pub(crate) fn selects(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Selectors of one kind by namespace, found by the labels of what they select. Each is filed under its first pair.
#[derive(Debug, Default)]
pub(crate) struct Selectors {
    filed: BTreeMap<Arc<str>, BTreeMap<String, BTreeMap<String, Names>>>,
    selectors: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Labels>>,
}

impl Selectors {
    /// Sets or removes (`None`, or without labels) the selector of an object.
    pub(crate) fn set(&mut self, namespace: &Arc<str>, name: &Arc<str>, selector: Option<&Labels>) {
        let of_namespace = self.selectors.entry(namespace.clone()).or_default();
        if let Some((key, value)) = of_namespace.remove(name).iter().find_map(Labels::first_key_value) {
            remove(&mut self.filed, namespace, key, value, name);
        }
        if let Some((selector, (key, value))) = selector.and_then(|s| Some((s, s.first_key_value()?))) {
            insert(&mut self.filed, namespace, key, value, name);
            of_namespace.insert(name.clone(), selector.clone());
        }
    }

    /// Objects of the namespace whose selector selects these labels, by name.
    pub(crate) fn matching(&self, namespace: &str, labels: &Labels) -> Names {
        let (Some(filed), Some(selectors)) = (self.filed.get(namespace), self.selectors.get(namespace))
        else {
            return Names::new();
        };
        let candidates = labels
            .iter()
            .filter_map(|(key, value)| filed.get(key)?.get(value))
            .flatten();
        let selecting = |name: &&Arc<str>| {
            selectors
                .get(*name)
                .is_some_and(|selector| selects(selector, labels))
        };
        candidates.filter(selecting).cloned().collect()
    }
}

/// Labelled objects by namespace, found by a selector.
#[derive(Debug, Default)]
pub(crate) struct Labelled {
    filed: BTreeMap<Arc<str>, BTreeMap<String, BTreeMap<String, Names>>>,
}

impl Labelled {
    /// Replaces the labels of an object.
    pub(crate) fn set(&mut self, namespace: &Arc<str>, name: &Arc<str>, old: &Labels, new: &Labels) {
        for (key, value) in old.iter().filter(|(key, value)| new.get(*key) != Some(value)) {
            remove(&mut self.filed, namespace, key, value, name);
        }
        for (key, value) in new.iter().filter(|(key, value)| old.get(*key) != Some(value)) {
            insert(&mut self.filed, namespace, key, value, name);
        }
    }

    /// Objects of the namespace that a selector selects, by name.
    pub(crate) fn matching(&self, namespace: &str, selector: &Labels) -> Names {
        let Some(filed) = self.filed.get(namespace) else {
            return Names::new();
        };
        let mut sets = Vec::with_capacity(selector.len());
        for (key, value) in selector {
            match filed.get(key).and_then(|values| values.get(value)) {
                Some(names) => sets.push(names),
                None => return Names::new(),
            }
        }
        sets.sort_by_key(|names| names.len());
        let Some((smallest, others)) = sets.split_first() else {
            return Names::new();
        };
        smallest
            .iter()
            .filter(|name| others.iter().all(|names| names.contains(*name)))
            .cloned()
            .collect()
    }

    /// Namespaces that have or had labelled objects.
    pub(crate) fn namespaces(&self) -> impl Iterator<Item = &Arc<str>> {
        self.filed.keys()
    }
}

type Filed = BTreeMap<Arc<str>, BTreeMap<String, BTreeMap<String, Names>>>;

fn insert(filed: &mut Filed, namespace: &Arc<str>, key: &str, value: &str, name: &Arc<str>) {
    let values = filed
        .entry(namespace.clone())
        .or_default()
        .entry(key.to_owned())
        .or_default();
    values.entry(value.to_owned()).or_default().insert(name.clone());
}

fn remove(filed: &mut Filed, namespace: &str, key: &str, value: &str, name: &str) {
    let Some(keys) = filed.get_mut(namespace) else {
        return;
    };
    let Some(values) = keys.get_mut(key) else { return };
    if let Some(names) = values.get_mut(value) {
        names.remove(name);
        if names.is_empty() {
            values.remove(value);
        }
    }
    if values.is_empty() {
        keys.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn names(found: &Names) -> Vec<&str> {
        found.iter().map(|name| &**name).collect()
    }

    #[test]
    fn both_directions_agree() {
        let (ns, other): (Arc<str>, Arc<str>) = ("shop".into(), "bank".into());
        let mut selectors = Selectors::default();
        let mut labelled = Labelled::default();
        let wanted = labels(&[("app", "a"), ("tier", "x")]);
        selectors.set(&ns, &"both".into(), Some(&wanted));
        selectors.set(&ns, &"app".into(), Some(&labels(&[("app", "a")])));
        selectors.set(&ns, &"none".into(), Some(&labels(&[])));
        selectors.set(&other, &"app".into(), Some(&labels(&[("app", "a")])));
        labelled.set(
            &ns,
            &"e1".into(),
            &labels(&[]),
            &labels(&[("app", "a"), ("tier", "x"), ("z", "1")]),
        );
        labelled.set(&ns, &"e2".into(), &labels(&[]), &labels(&[("app", "a")]));
        assert_eq!(
            names(&selectors.matching("shop", &labels(&[("app", "a"), ("tier", "x")]))),
            ["app", "both"]
        );
        assert_eq!(
            names(&selectors.matching("shop", &labels(&[("app", "a")]))),
            ["app"]
        );
        assert_eq!(names(&labelled.matching("shop", &wanted)), ["e1"]);
        assert_eq!(
            names(&labelled.matching("shop", &labels(&[("app", "a")]))),
            ["e1", "e2"]
        );
        assert!(
            labelled.matching("shop", &labels(&[])).is_empty()
                && labelled.matching("bank", &wanted).is_empty()
        );
        labelled.set(
            &ns,
            &"e1".into(),
            &labels(&[("app", "a"), ("tier", "x"), ("z", "1")]),
            &labels(&[("app", "b")]),
        );
        assert!(labelled.matching("shop", &wanted).is_empty());
        selectors.set(&ns, &"app".into(), None);
        assert!(selectors.matching("shop", &labels(&[("app", "a")])).is_empty());
    }
}
